"""``train.py --start_from``: a new run from the weights of another one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from fmlit.cli.export import export
from fmlit.flows.paths import CondOTPath
from fmlit.flows.predictions import Velocity
from fmlit.models.generative_model import GenerativeModel
from fmlit.models.mlp import MLP
from fmlit.storage.checkpoints import AtomicCheckpointIO, load
from fmlit.storage.exports import load as load_export
from fmlit.training.modules import GenerativeModule
from tests.helpers.known_model import save_run
from tests.helpers.small_runs import same
from tests.helpers.tiny_cli import CONFIGS, recipe, runs_in, train


class Wide(MLP):
    """A network of somebody else's."""


class Beginning:
    """What a run has when its first step begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: dict[str, Tensor] = {}
        original = GenerativeModule.on_train_start

        def on_train_start(module: GenerativeModule) -> None:
            original(module)
            self.weights = {name: value.clone() for name, value in module.model.net.state_dict().items()}
            self.images_seen, self.step = module.images_seen, module.trainer.global_step
            self.optimizer = module.trainer.optimizers[0].state_dict()["state"]

        set_rate, self.rates = GenerativeModule.on_before_optimizer_step, []

        def on_before_optimizer_step(module: GenerativeModule, optimizer: torch.optim.Optimizer) -> None:
            set_rate(module, optimizer)
            self.rates.append(optimizer.param_groups[0]["lr"] / module.optimizer.learning_rate)

        monkeypatch.setattr(GenerativeModule, "on_train_start", on_train_start)
        monkeypatch.setattr(GenerativeModule, "on_before_optimizer_step", on_before_optimizer_step)


@pytest.fixture
def beginning(monkeypatch: pytest.MonkeyPatch) -> Beginning:
    return Beginning(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder of a trained run."""
    assert train(tmp_path, "--name=source", "--seed_everything=3").code == 0
    return tmp_path / "runs" / "source"


def averaged(run: Path) -> dict[str, Tensor]:
    return next(iter(load(run / "checkpoints" / "last.ckpt")["ema"].values()))


@pytest.mark.parametrize("given", ["run", "checkpoint", "older"])
def test_a_new_run_starts_with_the_average_of_the_source_and_nothing_else(given, source, tmp_path, beginning):
    older = "000000240.ckpt"
    paths = {"run": source, "checkpoint": source / "checkpoints" / "last.ckpt", "older": source / "checkpoints" / older}
    outcome = train(tmp_path, f"--start_from={paths[given]}", "--images=160", "--model.schedule.warmup_images=1000")
    assert outcome.summary["images_seen"] == 160
    assert outcome.summary["run"] == str(tmp_path / "runs" / "tiny")
    assert f"; starts from the weights in {paths[given]}" in outcome.out.splitlines()[0]
    assert "resumed" not in outcome.out

    name = older if given == "older" else "last.ckpt"
    stored = load(source / "checkpoints" / name)
    assert same(beginning.weights, stored["ema"]["ema_100"])
    raw = {k.removeprefix("model.net."): v for k, v in stored["state_dict"].items() if k.startswith("model.net.")}
    assert not same(beginning.weights, raw)
    assert (beginning.images_seen, beginning.step) == (0, 0)
    assert beginning.optimizer == {}
    assert beginning.rates[-1] == pytest.approx((160 - 160 / len(beginning.rates) / 2) / 1000)  # warms up anew


def test_averages_start_from_these_weights_too(source, tmp_path):
    run = train(
        tmp_path,
        f"--start_from={source}",
        "--images=16",
        "--model.optimizer.learning_rate=1e-30",
        "--checkpoint.every=16",
    )
    assert same(averaged(Path(run.summary["run"])), averaged(source))


@pytest.mark.parametrize("options", [{"dtype": "float16", "shard_mb": 1}, {"weights": "raw"}])
def test_an_exported_model_is_a_start(options, tmp_path, beginning):
    """Wide enough for several files."""
    width = "--model.net.width=512"
    train(tmp_path, "--name=source", width, "--images=32", "--checkpoint.every=32")
    source, folder = tmp_path / "runs" / "source", tmp_path / "exported"
    assert any("-of-" in name for name in export(str(source), out=str(folder), **options)["files"]) == (
        "shard_mb" in options
    )
    shutil.rmtree(source)
    outcome = train(tmp_path, f"--start_from={folder}", width, "--images=16")
    assert f"; starts from the weights in {folder}" in outcome.out.splitlines()[0]
    assert same(beginning.weights, load_export(folder).net.state_dict())
    assert {value.dtype for value in beginning.weights.values()} == {torch.float32}


def test_it_helps_on_the_digits(tmp_path):
    digits = ("--data=Digits", "--data.batch_size=64", "--model.net.width=64", "--trainer.log_every_n_steps=1")
    train(
        tmp_path,
        "--name=source",
        *digits,
        "--images=12800",
        "--model.optimizer.learning_rate=3e-3",
        "--ema.half_lives=[1000]",
    )
    scratch = train(tmp_path, *digits, "--images=640").summary["loss"]
    started = train(tmp_path, *digits, "--images=640", f"--start_from={tmp_path / 'runs' / 'source'}").summary["loss"]
    assert started < 0.8 * scratch


def test_a_resumed_run_does_not_read_it(source, tmp_path, beginning):
    whole = train(tmp_path, "--name=whole", f"--start_from={source}").summary
    train(tmp_path, f"--start_from={source}", "--images=160")
    shutil.rmtree(source)
    outcome = train(tmp_path, f"--start_from={source}", "--resume")
    assert outcome.summary["loss"] == whole["loss"]
    assert beginning.images_seen == 160
    assert "resumed after 10 steps" in outcome.out.splitlines()[0]
    assert "starts from" not in outcome.out
    assert train(tmp_path, f"--start_from={source}", "--resume=auto", "--images=400").summary["images_seen"] == 400
    for run in ("tiny", "whole"):
        assert yaml.safe_load((tmp_path / "runs" / run / "config.yaml").read_text())["start_from"] == str(source)


def test_a_requeued_job_without_a_checkpoint_reads_it_again(source, tmp_path, beginning, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    start = f"--start_from={source}"
    train(tmp_path, start, "--checkpoint.every=null", "--trainer.max_steps=3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    outcome = train(tmp_path, start)
    assert outcome.summary["run"] == str(tmp_path / "runs" / "tiny")
    assert "starts from the weights" in outcome.out.splitlines()[0]
    assert same(beginning.weights, averaged(source))


def test_the_config_of_the_run_repeats_it(source, tmp_path):
    first = train(tmp_path, f"--start_from={source}", "--images=160").summary
    again = train(tmp_path, "--config", str(Path(first["run"]) / "config.yaml")).summary
    assert again["loss"] == first["loss"]
    without = train(tmp_path, "--config", str(Path(first["run"]) / "config.yaml"), "--start_from=null").summary
    assert without["loss"] != first["loss"]


def test_another_network_is_named_with_its_tensors(source, tmp_path):
    last = source / "checkpoints" / "last.ckpt"

    def refused(*args: str) -> str:
        error = train(tmp_path, f"--start_from={source}", *args).error
        assert f": {last} holds another network; give model.net the arguments that it was trained with" in error
        return error

    error = refused("--model.net.width=16")
    assert error.startswith(
        "start_from: inputs.weight ([8, 1] there, [16, 1] here), inputs.bias ([8] there, [16] here)"
    )
    assert " and 12 more: " in error
    assert "layers.1.0.weight (nothing there, [8] here)" in refused("--model.net.depth=2")
    assert "outputs.1.weight ([1, 8] there, [2, 8] here)" in refused("--data=fmlit.Moons")
    assert runs_in(tmp_path) == ["source"]


def test_other_classes_are_another_network(tmp_path):
    conditional = ("--model.conditional=true", "--data=Digits")
    train(tmp_path, "--name=source", *conditional)
    start = f"--start_from={tmp_path / 'runs' / 'source'}"
    assert "start_from: label.weight ([11, 8] there, nothing here): " in train(tmp_path, start, "--data=Digits").error
    assert train(tmp_path, start, *conditional, "--images=16").code == 0
    train(tmp_path, "--name=other", "--data=Digits", "--images=16", "--checkpoint.every=16")
    error = train(tmp_path, f"--start_from={tmp_path / 'runs' / 'other'}", *conditional).error
    assert error.startswith("start_from: label.weight (nothing there, [11, 8] here): ")


def test_what_is_no_trained_model_is_named(source, tmp_path):
    def error(path: str | Path) -> str:
        said = train(tmp_path, f"--start_from={path}").error
        assert said.startswith("start_from: ")
        return said

    way_out = ": give --start_from a .ckpt file, the folder of a run, or an exported one"
    assert (
        error(tmp_path / "nothing.ckpt") == f"start_from: there is no checkpoint {tmp_path / 'nothing.ckpt'}{way_out}"
    )
    (tmp_path / "empty").mkdir()
    last = tmp_path / "empty" / "checkpoints" / "last.ckpt"
    assert error(tmp_path / "empty") == f"start_from: there is no checkpoint {last}{way_out}"
    assert way_out in error("")

    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes((source / "checkpoints" / "last.ckpt").read_bytes()[:-500])
    assert f"checkpoint {damaged} is damaged" in error(damaged)

    export(str(source), out=str(tmp_path / "exported"))
    (tmp_path / "exported" / "model.safetensors").unlink()
    assert f"{tmp_path / 'exported'} does not hold an exported model" in error(tmp_path / "exported")

    content = load(source / "checkpoints" / "last.ckpt")
    AtomicCheckpointIO().save_checkpoint(content | {"ema": {}}, tmp_path / "raw.ckpt")
    assert "it holds no weights 'ema'; choose one of: raw" in error(tmp_path / "raw.ckpt")
    assert runs_in(tmp_path) == ["source"]


def test_classes_of_strangers_are_not_built(source, tmp_path, monkeypatch):
    content = load(source / "checkpoints" / "last.ckpt")
    content["model_description"]["init_args"]["net"] = {
        "class_path": "os.system",
        "init_args": {"command": "touch owned"},
    }
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "forged.ckpt")
    monkeypatch.chdir(tmp_path)
    error = train(tmp_path, f"--start_from={tmp_path / 'forged.ckpt'}").error
    assert error.startswith(f"start_from: checkpoint {tmp_path / 'forged.ckpt'}: 'os.system' is refused")
    assert not (tmp_path / "owned").exists()


def test_classes_that_the_configuration_names_are(tmp_path, beginning):
    own = f"{Wide.__module__}.Wide"
    folder = save_run(tmp_path / "own", GenerativeModel(Wide((1,), None, 8, 1), CondOTPath(), Velocity(), (1,)))
    assert f"'{own}' is refused" in train(tmp_path, f"--start_from={folder}").error
    assert train(tmp_path, f"--start_from={folder}", f"--model.net={own}", "--images=16").code == 0
    assert same(beginning.weights, averaged(folder))


@pytest.mark.slow
def test_two_processes_start_from_them(source, tmp_path):
    command = [sys.executable, str(CONFIGS.parent / "scripts" / "train.py"), "--config", str(recipe(tmp_path))]
    command += ["--runs", str(tmp_path / "runs"), f"--start_from={source}", "--trainer.devices=2"]
    options = [
        "--trainer.strategy=ddp",
        "--images=16",
        "--model.optimizer.learning_rate=1e-30",
        "--checkpoint.every=16",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert same(averaged(Path(json.loads(done.stdout.splitlines()[-1])["run"])), averaged(source))
    wrong = subprocess.run([*command, *options, "--model.net.width=16"], capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines() == [
        line for line in wrong.stderr.splitlines() if line.startswith("error: start_from")
    ]
    assert len(wrong.stderr.splitlines()) == 1
    assert runs_in(tmp_path) == ["source", "tiny"]
