"""The training command: help, configuration, the run folder, and going on after an interruption."""

import contextlib
import csv
import io
import json
import logging
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from PIL import Image

from fmlit.cli import train as command
from fmlit.core.errors import FileError, UserError
from fmlit.sampling.samplers import ODESampler
from fmlit.storage.checkpoints import load
from fmlit.training.trainer_settings import default_precision, static_graph_ddp
from tests.helpers.tiny_cli import CONFIGS, metrics_of, recipe, runs_in, train

SCRIPT = CONFIGS.parent / "scripts" / "train.py"


def printed_config(folder: Path, *args: str) -> dict[str, Any]:
    outcome = train(folder, *args, "--print_config")
    assert outcome.code == 0, outcome.err
    return yaml.safe_load(outcome.out)


def test_help_names_our_options_and_fits_the_signatures(tmp_path: Path) -> None:
    text = train(tmp_path, "--help").out
    for option in (
        "--images",
        "--runs",
        "--name",
        "--resume",
        "--ema.half_lives",
        "--quality.n",
        "--trainer.max_steps",
    ):
        assert re.search(rf"^ +{re.escape(option)}\b", text, re.MULTILINE), option
    for ignored in ("--trainer.max_epochs", "--trainer.limit_val_batches", "--trainer.enable_checkpointing"):
        assert ignored not in text
    assert "Half-lives" in text or "half-lives in images" in text  # the docstring of EMA


HINTS = re.findall(r"train\.py --([\w.]+)\.help ([\w.]+)", command.__doc__)


@pytest.mark.parametrize(("key", "cls"), HINTS)
def test_the_help_leads_to_the_arguments_of_model_and_data(tmp_path: Path, key: str, cls: str) -> None:
    outcome = train(tmp_path, f"--{key}.help", cls)
    assert outcome.code == 0
    expected = {
        "model": "--model.optimizer",
        "model.net": "channels CHANNELS",
        "model.path": "CondOTPath",
        "model.optimizer": "--optimizer.momentum",
        "data": "--data.horizontal_flip",
        "samples.sampler": "--samples.sampler.steps",
        "trainer.logger": "--trainer.logger.project",
    }
    assert expected[key] in outcome.out
    assert "torch.nn" not in outcome.out  # hundreds of modules are no networks of ours


def test_all_of_these_hints_are_tested() -> None:
    assert {key for key, _ in HINTS} == {
        *("model", "model.net", "model.path", "model.optimizer"),
        *("data", "samples.sampler", "trainer.logger"),
    }


def test_without_a_recipe_the_script_trains_the_quickstart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--print_config"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not end.value.code
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["images"] == quickstart["images"]
    assert shown["data"]["class_path"] == quickstart["data"]["class_path"]
    net, wanted = shown["model"]["init_args"]["net"], quickstart["model"]["init_args"]["net"]
    assert net["class_path"] == wanted["class_path"]
    assert net["init_args"].items() >= wanted["init_args"].items()  # the defaults are shown as well
    assert shown["ema"]["half_lives"] == quickstart["ema"]["half_lives"]


def test_the_default_recipe_does_not_leak_into_others(tmp_path: Path) -> None:
    """Every key that the other recipe does not set has the default of its signature."""
    other = tmp_path / "other.yaml"
    other.write_text("model: {class_path: fmlit.FlowMatchingModule, init_args: {net: fmlit.MLP}}\ndata: fmlit.Moons\n")
    shown = printed_config(tmp_path, "--config", str(other))
    assert shown["images"] == 1_000_000
    assert shown["ema"]["half_lives"] == [500_000]
    assert shown["checkpoint"]["every"] == 500_000
    assert shown["model"]["init_args"]["net"]["init_args"] == {"width": 256, "depth": 3}
    assert shown["data"] == {
        "class_path": "fmlit.Moons",
        "init_args": {"samples": 10_000, "batch_size": 128, "noise": 0.05},
    }


@pytest.mark.parametrize("given", ["--samples.sampler=SDESampler", f"--config={CONFIGS / 'mnist_score.yaml'}"])
def test_another_class_has_its_own_defaults(tmp_path: Path, given: str) -> None:
    """jsonargparse would hand it those of the class that stood there before: 18 steps on EDM's grid."""
    sampler = printed_config(tmp_path, given)["samples"]["sampler"]["init_args"]
    assert (sampler["steps"], sampler["grid"]["class_path"]) == (250, "fmlit.UniformGrid")


@pytest.mark.parametrize("value", ["null", "max-autotune"])
def test_a_nested_option_of_a_recipe_is_changed_or_removed(tmp_path: Path, value: str) -> None:
    path = recipe(tmp_path, "    net:\n", "    execution: {compile: default}\n    net:\n")
    shown = printed_config(tmp_path, "--config", str(path), f"--model.execution.compile={value}")
    assert shown["model"]["init_args"]["execution"] == {"channels_last": False, "compile": yaml.safe_load(value)}


def test_another_optimizer_keeps_the_settings_that_it_shares(tmp_path: Path) -> None:
    shown = printed_config(tmp_path, f"--config={CONFIGS / 'quickstart.yaml'}", "--model.optimizer=AdamW")
    assert shown["model"]["init_args"]["optimizer"] == {
        "class_path": "fmlit.AdamW",
        "init_args": {"learning_rate": 6e-3, "betas": [0.9, 0.999], "weight_decay": 0.0},
    }


def test_another_class_keeps_what_was_asked_for(tmp_path: Path) -> None:
    asked = ("--samples.sampler.guidance=3", "--samples.sampler.steps=40", "--samples.sampler=SDESampler")
    sampler = printed_config(tmp_path, *asked)["samples"]["sampler"]["init_args"]
    assert (sampler["guidance"], sampler["steps"], sampler["method"]) == (3.0, 40, "euler_maruyama")
    model = printed_config(tmp_path, "--model=ScoreMatchingModule")["model"]["init_args"]
    assert model["net"]["init_args"]["width"] == 8
    assert (model["path"]["class_path"], model["prediction"]["class_path"]) == ("fmlit.VPPath", "fmlit.Noise")


def test_a_sampler_in_a_recipe_and_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    extra = tmp_path / "extra.yaml"
    extra.write_text(
        "samples: {sampler: {class_path: ODESampler, init_args: {method: unipc, guidance: 2.0, "
        "guidance_interval: [0.2, 0.8], options: {order: 3}}}}\n"
    )
    sampler = printed_config(tmp_path, "--config", str(extra))["samples"]["sampler"]["init_args"]
    assert (sampler["guidance_interval"], sampler["options"]) == ([0.2, 0.8], {"order": 3})
    key = "--samples.sampler"
    written = (f"{key}.method=unipc", f"{key}.options.order=3", f"{key}.guidance_interval=[0.2,0.8]")
    sampler = printed_config(tmp_path, *written)["samples"]["sampler"]["init_args"]
    assert (sampler["method"], sampler["guidance_interval"], sampler["options"]) == ("unipc", [0.2, 0.8], {"order": 3})


def test_later_recipes_and_options_win(tmp_path: Path) -> None:
    extra = tmp_path / "extra.yaml"
    extra.write_text("images: 5\nema: {ramp: 0.3}\n")
    shown = printed_config(tmp_path, "--config", str(recipe(tmp_path)), f"--config={extra}", "--images=7")
    assert (shown["images"], shown["ema"]) == (7, {"half_lives": [100], "ramp": 0.3})


def test_a_run_leaves_its_folder_and_one_line_of_json(tmp_path: Path) -> None:
    quality = ("--quality.every=320", "--quality.n=20", f"--quality.cache={tmp_path / 'statistics'}")
    outcome = train(tmp_path, "--data=Digits", "--samples.every=160", *quality)
    assert outcome.err == ""
    assert outcome.out.splitlines()[0].startswith(f"{tmp_path / 'runs' / 'tiny'}: FlowMatchingModule, CondOTPath, MLP")
    run = tmp_path / "runs" / "tiny"
    assert sorted(path.name for path in run.iterdir()) == [
        *("checkpoints", "config.yaml", "lease.1", "metrics.csv", "run.json", "samples")
    ]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["000000160.png", "000000320.png"]
    assert (run / "checkpoints" / "last.ckpt").resolve() == (run / "checkpoints" / "000000320.ckpt").resolve()

    summary = outcome.summary
    assert summary["run"] == str(run)
    assert (summary["images_seen"], summary["steps"]) == (320, 20)
    assert summary["samples"] == str(run / "samples" / "000000320.png")
    assert summary["checkpoint"] == str(run / "checkpoints" / "000000320.ckpt")
    assert outcome.out.splitlines()[-2].startswith("fd_pixels_20 is fdpixels20-train-uint8-ema-heun18")
    last = metrics_of(run)[-1]  # of two callbacks that log at the same step
    assert last["images_seen"] == "320"
    assert float(last["loss"]) == pytest.approx(summary["loss"])
    assert float(last["fd_pixels_20"]) == pytest.approx(summary["fd_pixels_20"])


def test_the_length_of_a_run_is_in_images(tmp_path: Path) -> None:
    assert train(tmp_path, "--images=330").summary["images_seen"] == 336  # whole batches of 16
    assert train(tmp_path, "--data.batch_size=32").summary["steps"] == 10
    assert train(tmp_path, "--trainer.max_steps=3").summary["images_seen"] == 48


def test_the_folder_of_all_runs_is_expanded_once_for_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a recipe, too. Lightning, which expands ~ itself, and the rest of a run write to one folder."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "tilde.yaml"
    config.write_text(f"{recipe(tmp_path).read_text()}\nruns: ~/mine\n")
    summary = train(tmp_path, "--config", str(config)).summary
    run = tmp_path / "home" / "mine" / "tilde"
    assert summary["run"] == str(run)
    assert summary["checkpoint"] == str(run / "checkpoints" / "000000320.ckpt")
    assert len(metrics_of(run)) == 4
    assert "resumed after 20 steps" in train(tmp_path, "--runs=$HOME/mine", "--name=tilde", "--resume").out
    assert not runs_in(tmp_path)
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("root", ["s3://bucket/runs", "gs://bucket", "$NO_SUCH_VARIABLE/runs"])
def test_a_folder_of_runs_that_is_none_is_refused_and_leaves_nothing(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path, f"--runs={root}").error.startswith("runs: ")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_the_trainer_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, build = [], command.LightningCLI.instantiate_trainer

    def count(self: command.LightningCLI, **settings: Any) -> pl.Trainer:
        built.append(build(self, **settings))
        return built[-1]

    monkeypatch.setattr(command.LightningCLI, "instantiate_trainer", count)
    assert train(tmp_path, "--images=16").code == 0
    assert len(built) == 1


def test_ddp_gets_a_static_graph_and_the_choice_of_the_user_stays() -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_progress_bar": False}
    registered = StrategyRegistry["ddp"]
    for given, static in {"auto": True, "ddp": True, "ddp_find_unused_parameters_true": False}.items():
        with static_graph_ddp():
            strategy: Any = pl.Trainer(**options, strategy=given).strategy
        assert isinstance(strategy, DDPStrategy)
        assert strategy._ddp_kwargs.get("static_graph", False) == static
        assert strategy._ddp_kwargs.get("gradient_as_bucket_view", False) == static
        assert (strategy._timeout.total_seconds() == 600) == static
    assert StrategyRegistry["ddp"] is registered
    assert not pl.Trainer(**options, strategy="ddp").strategy._ddp_kwargs  # type: ignore[attr-defined]


def test_an_occupied_name_gets_a_number(tmp_path: Path) -> None:
    for _ in range(3):
        assert train(tmp_path, "--trainer.max_steps=1").code == 0
    assert train(tmp_path, "--trainer.max_steps=1", "--name=other").code == 0
    assert runs_in(tmp_path) == ["other", "tiny", "tiny-002", "tiny-003"]


def test_the_config_of_a_run_is_a_recipe_that_repeats_it(tmp_path: Path) -> None:
    first = train(tmp_path, "--model.optimizer.learning_rate=0.01", "--seed_everything=5").summary
    config = tmp_path / "runs" / "tiny" / "config.yaml"
    again = train(tmp_path, "--config", str(config)).summary
    assert again["run"] == str(tmp_path / "runs" / "tiny-002")
    assert again["loss"] == first["loss"]
    assert train(tmp_path, "--config", str(config), "--seed_everything=6").summary["loss"] != first["loss"]


def test_resume_goes_on_where_the_run_ended(tmp_path: Path) -> None:
    whole = train(tmp_path, "--name=whole", "--images=640").summary
    train(tmp_path)
    outcome = train(tmp_path, "--resume", "--images=640")
    assert "resumed after 20 steps" in outcome.out.splitlines()[0]
    assert outcome.summary["run"] == str(tmp_path / "runs" / "tiny")
    assert outcome.summary["images_seen"] == 640
    assert outcome.summary["loss"] == whole["loss"]
    rows = metrics_of(tmp_path / "runs" / "tiny")
    assert [row["step"] for row in rows] == [str(step) for step in range(5, 45, 5)]
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics_of(tmp_path / "runs" / "whole")]
    assert yaml.safe_load((tmp_path / "runs" / "tiny" / "config.yaml").read_text())["resume"] is False


def test_resume_takes_the_newest_run_of_that_name(tmp_path: Path) -> None:
    train(tmp_path)
    train(tmp_path, "--images=80")
    assert train(tmp_path, "--resume", "--images=160").summary["run"] == str(tmp_path / "runs" / "tiny-002")


def test_a_runs_own_config_resumes_that_run_and_no_other_of_its_name(tmp_path: Path) -> None:
    for images in (80, 160, 240):
        train(tmp_path, f"--images={images}")
    first, *others = (tmp_path / "runs" / name for name in ("tiny", "tiny-002", "tiny-003"))
    before = [file.read_bytes() for run in others for file in sorted(run.rglob("*")) if file.is_file()]
    config = f"--config={first / 'config.yaml'}"
    assert train(tmp_path, config, "--resume", "--images=320").summary["run"] == str(first)
    assert train(tmp_path, config, "--resume=auto", "--images=400").summary["run"] == str(first)
    assert [file.read_bytes() for run in others for file in sorted(run.rglob("*")) if file.is_file()] == before
    assert train(tmp_path, config, "--images=80").summary["run"] == str(tmp_path / "runs" / "tiny-004")
    assert "no run named 'else'" in train(tmp_path, config, "--name=else", "--resume").error


def test_a_run_that_was_moved_is_resumed_where_it_lies(tmp_path: Path) -> None:
    train(tmp_path, "--images=80")
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "runs" / "tiny").rename(tmp_path / "elsewhere" / "best_one")
    config = f"--config={moved / 'config.yaml'}"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        command.train([config, "--resume", "--images=160"])
    assert json.loads(out.getvalue().splitlines()[-1])["run"] == str(moved)


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1), (4, 2)])
def test_a_run_that_is_resumed_with_other_accumulation_makes_whole_steps(
    tmp_path: Path, before: int, after: int
) -> None:
    key = "--trainer.accumulate_grad_batches"
    train(tmp_path, "--trainer.max_steps=3", f"{key}={before}")
    summary = train(tmp_path, "--resume", f"{key}={after}").summary
    assert (summary["images_seen"], summary["steps"]) == (320, 20)
    rows = list(csv.DictReader((tmp_path / "runs" / "tiny" / "metrics.csv").open()))
    assert all(int(row["images_seen"]) == 16 * int(row["step"]) for row in rows)


def test_resuming_a_finished_run_says_so_and_changes_nothing(tmp_path: Path) -> None:
    train(tmp_path)
    before = (tmp_path / "runs" / "tiny" / "metrics.csv").read_bytes()
    outcome = train(tmp_path, "--resume")
    assert "nothing is left to train" in outcome.out.splitlines()[0]
    assert outcome.summary["images_seen"] == 320
    assert outcome.summary["checkpoint"].endswith("last.ckpt")
    assert (tmp_path / "runs" / "tiny" / "metrics.csv").read_bytes() == before


def test_a_run_that_is_resumed_with_another_batch_ends_at_the_same_number_of_images(tmp_path: Path) -> None:
    train(tmp_path, "--images=160", "--data.batch_size=16")
    outcome = train(tmp_path, "--resume", "--images=400", "--data.batch_size=24")
    assert "400 images in 20 steps of 24; resumed after 10 steps, " in outcome.out.splitlines()[0]
    assert (outcome.summary["images_seen"], outcome.summary["steps"]) == (400, 20)


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_a_run_that_is_resumed_takes_the_optimizers_settings_of_now(optimizer: str, tmp_path: Path) -> None:
    options = (f"--model.optimizer={optimizer}", "--model.net.width=32", "--trainer.log_every_n_steps=1")
    options += ("--model.schedule.decay=linear",)
    train(tmp_path, *options, "--images=160", "--model.optimizer.learning_rate=1e-3")
    changed = ("learning_rate=1e-6", "weight_decay=0.5", "betas=[0.5,0.6]")
    changed = tuple(f"--model.optimizer.{setting}" for setting in changed)
    outcome = train(tmp_path, *options, "--resume", "--images=320", *changed)
    rates = [float(row["learning_rate"]) for row in metrics_of(tmp_path / "runs" / "tiny")[-10:]]
    assert rates == pytest.approx([1e-6 * (1 - (step + 0.5) / 20) for step in range(10, 20)])
    (state,) = load(outcome.summary["checkpoint"])["optimizer_states"]
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.5}
    assert {tuple(group["betas"]) for group in state["param_groups"] if "betas" in group} == {(0.5, 0.6)}


def test_max_time_is_that_of_a_launch(tmp_path: Path) -> None:
    """A job that may take so long is started again and again until its run is done."""
    options = ("--images=100_000_000", "--trainer.max_time=00:00:00:01")
    first = train(tmp_path, *options)
    assert f"ended after {first.summary['steps']:,} of 6,250,000 steps; --resume goes on" in first.err
    again = train(tmp_path, *options, "--resume")
    assert again.summary["steps"] > first.summary["steps"]


def test_what_is_learnt_is_saved_before_it_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UserError("no samples today")

    monkeypatch.setattr(ODESampler, "sample", fail)
    outcome = train(tmp_path, "--images=160", "--samples.every=80", "--checkpoint.every=80")
    assert outcome.error.startswith("no samples today")
    assert load(tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt")["images_seen"] == 80


def test_a_requeued_job_comes_back_to_its_folder_even_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    train(tmp_path, "--checkpoint.every=null", "--trainer.max_steps=3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    outcome = train(tmp_path)
    assert outcome.summary["run"] == str(tmp_path / "runs" / "tiny")
    assert "resumed" not in outcome.out
    assert [row["step"] for row in metrics_of(tmp_path / "runs" / "tiny")] == ["5", "10", "15", "20"]
    assert "resumed after 20 steps" in train(tmp_path, "--images=400").out


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise FileError("no space left on device")

    monkeypatch.setattr(command.GenerativeModule, "training_step", fail)
    assert train(tmp_path).error == "no space left on device"
    assert not runs_in(tmp_path)


def test_a_run_that_fails_later_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = command.GenerativeModule.training_step

    def fail(self: command.GenerativeModule, batch: dict[str, torch.Tensor], index: int) -> Any:
        if self.images_seen == 160:
            raise FileError("no space left on device")
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(command.GenerativeModule, "training_step", fail)
        assert train(tmp_path).error == "no space left on device"
    assert runs_in(tmp_path) == ["tiny"]
    assert train(tmp_path, "--resume").summary["images_seen"] == 320


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def strict(text: str) -> Any:
        raise AssertionError(f"{text} is no JSON")

    def log(self: command.TrainingLog, trainer: pl.Trainer, module: command.GenerativeModule) -> None:
        module.run.latest = {"loss": float("nan"), "images_per_second": 1.0}

    monkeypatch.setattr(command.TrainingLog, "_log", log)
    line = train(tmp_path).out.splitlines()[-1]
    assert json.loads(line, parse_constant=strict)["loss"] is None


def test_the_progress_bar_can_be_left_out(tmp_path: Path) -> None:
    assert len(train(tmp_path).out.splitlines()) > 5
    assert len(train(tmp_path, "--trainer.enable_progress_bar=false").out.splitlines()) == 2


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_precision("cpu") == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capable, precision in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, capable=capable: capable)
        assert default_precision("auto") == precision
        assert default_precision("cpu") == "32-true"


def test_the_profiler_that_was_asked_for_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lightning.pytorch.profilers")
    logger.addHandler(caplog.handler)
    assert train(tmp_path, "--trainer.profiler=simple", "--trainer.max_steps=2").code == 0
    logger.removeHandler(caplog.handler)
    assert "run_training_batch" in caplog.text


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures of two classes."""
    for seed, name in enumerate(("cat", "dog")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        for copy in range(16):
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{copy}.png")
    return tmp_path / "pictures"


def on_pictures(folder: Path) -> list[str]:
    data = ["--data=fmlit.ImageFolder", f"--data.root={folder}", "--data.size=8", "--data.batch_size=8"]
    return [*data, "--model.conditional=true"]


def test_a_run_is_not_resumed_on_classes_of_other_names(
    tmp_path: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = on_pictures(pictures)
    assert train(tmp_path, *data, "--images=80").code == 0
    description = load(tmp_path / "runs/tiny/checkpoints/last.ckpt")["model_description"]
    assert description["init_args"]["class_names"] == ("cat", "dog")
    (pictures / "cat").rename(pictures / "zebra")  # what was class 0 would be class 1
    refused = train(tmp_path, *data, "--images=160", "--resume")
    assert refused.code == 2
    assert "model.class_names ([cat, dog] there, [dog, zebra] here)" in refused.error
    started = train(tmp_path, *data, "--images=80", "--name=new", f"--start_from={tmp_path}/runs/tiny")
    assert started.code == 0
    assert "are [cat, dog], and are now [dog, zebra]" in caplog.text


def test_a_run_that_is_resumed_on_other_pictures_says_so(
    tmp_path: Path, pictures: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def resume(images: int) -> list[str]:
        recwarn.clear()
        assert train(tmp_path, *on_pictures(pictures), f"--images={images}", "--resume").code == 0
        return [text for text in messages(recwarn) if text.startswith("the training data have changed")]

    assert train(tmp_path, *on_pictures(pictures), "--images=80").code == 0
    assert resume(160) == []
    Image.new("RGB", (8, 8)).save(pictures / "cat" / "0.png")
    os.utime(pictures / "cat" / "0.png", (1, 1))  # a clock may be coarse
    change = "the training data have changed since this run was interrupted"
    assert resume(240) == [f"{change}: 32 items as then, but other contents"]
    assert resume(320) == []
    Image.new("RGB", (8, 8)).save(pictures / "dog" / "new.png")
    assert resume(400) == [f"{change}: 32 items then, 33 now"]


def messages(recwarn: pytest.WarningsRecorder) -> list[str]:
    return [str(warning.message) for warning in recwarn]


def test_a_warm_up_that_takes_most_of_the_run_is_named(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    train(tmp_path, "--model.schedule.warmup_images=80", "--images=320")
    assert not any("warmup_images" in text for text in messages(recwarn))
    train(tmp_path, "--model.schedule.warmup_images=640000", "--images=320")
    rises = "the learning rate rises over 640,000 images, and the run has 320: it may learn little; try 16"
    assert f"model.schedule.warmup_images: {rises}" in messages(recwarn)


def test_early_stopping_acts_on_what_is_logged(tmp_path: Path) -> None:
    stopping = (
        "--trainer.callbacks=EarlyStopping",
        "--trainer.callbacks.monitor=loss",
        "--trainer.callbacks.patience=2",
    )
    never = "--trainer.callbacks.min_delta=1000"  # no loss falls by so much
    outcome = train(tmp_path, *stopping, never, "--images=3200")
    assert outcome.code == 0
    assert outcome.summary["images_seen"] == 3 * 5 * 16  # at the third row
    assert outcome.summary["checkpoint"].endswith("000000240.ckpt")
    assert len(metrics_of(tmp_path / "runs" / "tiny")) == 3
