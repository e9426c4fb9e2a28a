"""Every mistake ends with exit code 2 and one line that names the key or the file, and leaves nothing behind."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from fmlit.cli import errors
from fmlit.cli.parsing import LINKS, tidy
from fmlit.core.errors import FileError, LostProcessError, TryAgainError, UserError, writing_error
from fmlit.training.modules import FlowMatchingModule
from tests.helpers.tiny_cli import CONFIGS, recipe, runs_in, train

NETWORKS = """
from torch import nn

class WidthFirst(nn.Module):
    def __init__(self, width: int = 8, depth: int = 1):
        super().__init__()

class NoClasses(nn.Module):
    def __init__(self, shape, width: int = 8):
        super().__init__()

class Swapped(nn.Module):
    def __init__(self, num_classes, shape):
        super().__init__()

class Forgetful(nn.Module):
    def __init__(self, shape, num_classes, width=3):
        super().__init__()
        self.shape, self.num_classes = shape, num_classes
        self.linear = nn.Linear(1, 1)

    def forward(self, x, t, labels):
        raise RuntimeError("trained")

class TwoArguments(nn.Module):
    def __init__(self, shape, num_classes):
        super().__init__()
        self.shape, self.num_classes = shape, num_classes
        self.linear = nn.Linear(1, 1)

    def forward(self, x, t):
        return self.linear(x)
"""


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's own, with networks that cannot be used."""
    (tmp_path / "foreign_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign_networks", raising=False)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ("--imagess=3", "imagess: no such option; did you mean images?"),
        ("--xyz=3", "xyz: no such option; --help lists them"),
        ("--model.sched=3", "model.sched: no such option; did you mean model.schedule?"),
        (
            "--model.optimizer.lerning_rate=3",
            "model.optimizer.lerning_rate: no such option; did you mean model.optimizer.learning_rate?",
        ),
        ("--model.net.widht=3", "model.net.widht: no such option; did you mean model.net.width?"),
        ("--model.init_args.net.init_args.widht=3", "model.net.widht: no such option; did you mean model.net.width?"),
        ("--model.path.power=3", "model.path.power: no such option; --model.path.help fmlit.CondOTPath lists them"),
        ("--ema.rampe=3", "ema.rampe: no such option; did you mean ema.ramp?"),
        ("--data.batchsize=3", "data.batchsize: no such option; did you mean data.batch_size?"),
        ("--trainer.devicess=3", "trainer.devicess: no such option; did you mean trainer.devices?"),
        ("--trainer.max_epochs=3", "trainer.max_epochs: no such option; did you mean images?"),
        ("images=1000", "images=1000: an option begins with two dashes: --images=1000"),
        ("--images=64kb", "images: Expected an int. Got value: 64kb"),
        ("--images=1.5e0", "images: Expected an int. Got value: 1.5"),
        (
            "--model.net=torchvision.models.resnet18",
            "model.net: torchvision.models.resnet.resnet18 must take shape and num_classes as its first two arguments, "
            "in that order; it takes weights, progress, kwargs",
        ),
        ("--samples.sampler.stepps=3", "samples.sampler.stepps: no such option; did you mean samples.sampler.steps?"),
        ("--lr=3", "lr: no such option; did you mean model.optimizer.learning_rate?"),
        ("--model.lr=3", "model.lr: no such option; did you mean model.optimizer.learning_rate?"),
        ("--learning_rates=3", "learning_rates: no such option; did you mean model.optimizer.learning_rate?"),
        ("--batch_size=3", "batch_size: no such option; did you mean data.batch_size?"),
        ("--width=3", "width: no such option; did you mean model.net.width?"),
        ("--epochs=3", "epochs: no such option; did you mean images?"),
        ("--model.net.shape=3", "model.net.shape: cannot be set; whatever builds fmlit.MLP passes it"),
    ],
)
def test_unknown_keys_are_named_in_full_with_a_close_match(tmp_path: Path, option: str, error: str) -> None:
    assert train(tmp_path, option).error == error
    assert not runs_in(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("images:", "imagess:", "imagess: no such option; did you mean images?"),
        ("net:\n", "nett:\n", "model.nett: no such option; did you mean model.net?"),
        ("width:", "widht:", "model.net.widht: no such option; did you mean model.net.width?"),
        ("half_lives:", "half_life:", "ema.half_life: no such option; did you mean ema.half_lives?"),
        (
            "    net:\n",
            "    path: {class_path: fmlit.VPPath, init_args: {rate_mim: 1}}\n    net:\n",
            "model.path.rate_mim: no such option; did you mean model.path.rate_min?",
        ),
    ],
)
def test_unknown_keys_of_a_recipe_are_named_as_on_the_command_line(
    tmp_path: Path, old: str, new: str, error: str
) -> None:
    path = recipe(tmp_path, old, new, "wrong.yaml")
    assert train(tmp_path, "--config", str(path)).error == error


@pytest.mark.parametrize(
    ("option", "key", "said"),
    [
        ("--images=abc", "images", "Expected an int. Got value: abc"),
        ("--model.net.width=abc", "model.net.width", "Expected an int. Got value: abc"),
        ("--model.optimizer.betas=[1,x]", "model.optimizer.betas", "Expected a float. Got value: x"),
        ("--samples.every=abc", "samples.every", "Expected an int. Got value: abc"),
        ("--samples.sampler.grid.rho=x", "samples.sampler.grid.rho", "Expected a float. Got value: x"),
        ("--samples.sampler.method=eulr", "samples.sampler.method", "Expected one of ['euler', "),
        (
            "--model.schedule.decay=fast",
            "model.schedule.decay",
            "Expected one of ['constant', 'linear', 'cosine']. Got value: fast",
        ),
        ("--trainer.precision=17", "trainer.precision", "Got value: 17"),
        ("--trainer.precision=bf16-true", "trainer.precision", "the weights in half precision: use bf16-mixed"),
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val", "not negative, got -1"),
        ("--trainer.strategy=ddp_spawn", "trainer", "train in copies of this process: use ddp"),
        ("--quality.metrics=[]", "quality", "no metrics: choose from fid, "),
        ("--seed_everything=true", "seed_everything", "Expected an int"),
        ("--model=null", "model", "required, and not given"),
        ("--model.net=null", "model.net", "required, and not given"),
        ("--model.net=UNett", "model.net", "there is no class UNett; did you mean fmlit.UNet?"),
        ("--model.net=fmlit.models.unet.Unet", "model.net", "did you mean fmlit.UNet?"),
        ("--model.net=nowhere.Net", "model.net", "No module named 'nowhere'"),
        ("--model.path=CosinPath", "model.path", "did you mean fmlit.CosinePath?"),
        ("--model.path=VP", "model.path", "there is no class VP; did you mean fmlit.VPPath?"),
        ("--model.path=cosinepath", "model.path", "did you mean fmlit.CosinePath?"),
        ("--trainer.logger=wandb", "trainer.logger", "there is no class wandb; did you mean fmlit.WandbLogger?"),
        ("--trainer.callbacks=[Nothing]", "trainer.callbacks", "there is no class Nothing"),
        ("--data=Xyz", "data", "there is no class Xyz"),
        ("--trainer.logger=WandbLoger", "trainer.logger", "did you mean fmlit.WandbLogger?"),
    ],
)
def test_a_wrong_value_is_shown_with_its_key(tmp_path: Path, option: str, key: str, said: str) -> None:
    error = train(tmp_path, option).error
    assert error.startswith(f"{key}: ")
    assert said in error


@pytest.mark.parametrize(
    ("options", "start"),
    [
        (["--images=0"], "images: a run has at least 1 training image, got 0"),
        (["--images=-5"], "images: a run has at least 1 training image, got -5"),
        (["--trainer.max_steps=0"], "trainer.max_steps: at least 1"),
        (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches: at least 1"),
        (["--data.batch_size=0"], "data.batch_size must be at least 1, got 0"),
        (["--ema.half_lives=[]"], "ema.half_lives must be distinct positive numbers"),
        (["--model.draws.label_drop=3"], "model.draws.label_drop must be a probability"),
        (["--model.schedule.warmup_images=-1"], "model.schedule: images must be positive, warmup_images and"),
        (["--model.optimizer.learning_rate=0"], "model.optimizer.learning_rate must be positive, got 0.0"),
        (["--model.optimizer=Muon", "--model.optimizer.momentum=1"], "model.optimizer.momentum must lie in [0, 1)"),
        (
            ["--model.optimizer=TorchOptimizer", "--model.optimizer.name=SDG"],
            "model.optimizer.name: torch.optim has no optimizer SDG; did you mean SGD?",
        ),
        (["--model.path=VPPath", "--model.path.rate_min=-1"], "model.path: VPPath needs 0 < rate_min"),
        (["--model.net.width=3"], "model.net: MLP needs an even width"),
        (["--quality.sampler=ODESampler", "--quality.sampler.steps=0"], "quality.sampler.steps must be at least 1"),
        (["--quality.sampler.steps=3"], "quality.sampler.steps: scores use samples.sampler, unless --quality.sampler"),
        (["--samples.sampler.steps=0"], "samples.sampler.steps must be at least 1"),
        (["--samples.sampler.grid.rho=0"], "samples.sampler.grid: EDMGrid.rho must be positive"),
        (["--model.conditional=true"], "model.conditional: true needs data with classes"),
        (["--trainer.devices=0"], "trainer: "),
        (["--trainer.accelerator=abacus"], "trainer: "),
        (["--trainer.accumulate_grad_batches=3"], "data.batch_size 16 is not divisible by 3"),
        (["--data=MNIST", "--data.download=false", "--data.root=nowhere"], "data: MNIST: there is no folder nowhere"),
        (["--data=ImageFolder", "--data.root=nowhere", "--data.size=8"], "data: there is no folder nowhere"),
        (["--data=ImageFolder", "--data.root=nowhere"], "data.size: required, and not given"),
        (["--name=a/b"], "a run's name is a plain folder name"),
        (["--resume"], "there is no run named 'tiny'"),
    ],
)
def test_what_a_constructor_refuses_is_headed_by_its_key(tmp_path: Path, options: list[str], start: str) -> None:
    assert train(tmp_path, *options).error.startswith(start)
    assert not runs_in(tmp_path)


@pytest.mark.parametrize(
    ("callback", "arguments", "instead"),
    [
        ("GradientAccumulationScheduler", ["scheduling={0: 4}"], "set trainer.accumulate_grad_batches"),
        ("BatchSizeFinder", [], "set data.batch_size"),
        ("LearningRateFinder", [], "set model.optimizer.learning_rate"),
        ("EMAWeightAveraging", [], "see ema"),
        ("StochasticWeightAveraging", ["swa_lrs=0.1"], "see ema"),
        ("ModelCheckpoint", [], "see checkpoint"),
        ("OnExceptionCheckpoint", ["dirpath=x"], "see checkpoint"),
        ("Timer", ["duration=00:00:01:00"], "set trainer.max_time"),
    ],
)
def test_callbacks_that_do_what_fmlit_does_are_refused(
    tmp_path: Path, callback: str, arguments: list[str], instead: str
) -> None:
    given = [f"--trainer.callbacks.{argument}" for argument in arguments]
    error = train(tmp_path, f"--trainer.callbacks={callback}", *given).error
    assert error.startswith(f"trainer.callbacks: {callback} cannot be used here; ")
    assert instead in error
    assert not runs_in(tmp_path)


def test_counts_and_names_of_options_may_be_written_as_people_do():
    given = ["--images", "1e6", "--checkpoint.every=64k", "--model.schedule.warmup-images", "1.5M"]
    written = ["--images", "1000000", "--checkpoint.every=64000", "--model.schedule.warmup_images", "1500000"]
    assert tidy([*given, "--data.batch-size=2e2"]) == [*written, "--data.batch_size=200"]
    other_options = ["--name=64k", "--name", "1e6", "--model.optimizer.learning_rate=1e-3", "--data.root=a-b"]
    other_values = ["--images=1.5", "--images=1e-3", "--images", "k", "--resume", "--images=3"]
    assert tidy([*other_options, *other_values]) == [*other_options, *other_values]


@pytest.mark.parametrize("key", sorted(LINKS))
def test_what_would_be_overwritten_by_a_link_is_refused(tmp_path: Path, key: str) -> None:
    assert train(tmp_path, f"--{key}", "3").error.startswith(f"{key}: takes its value from ")
    owner, name = key.split(".", 1)
    assert train(tmp_path, f"--{owner}.init_args.{name}=3").error.startswith(f"{key}: ")


def test_links_are_refused_in_a_recipe_as_well(tmp_path: Path) -> None:
    path = recipe(tmp_path, "batch_size: 16", "batch_size: 16, seed: 3", "wrong.yaml")
    assert train(tmp_path, "--config", str(path)).error.startswith("data.seed: takes its value from seed_everything")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("images: [1, 2\nmodel: }\n", ", line 2, column 6: "),
        ("images: 1\n\tname: a\n", ", line 2, column 1: "),
        ("- 1\n- 2\n", " must hold keys and values, not a list"),
        ("just words\n", " must hold keys and values, not a str"),
    ],
)
def test_a_broken_recipe_is_named_with_the_place(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    assert train(tmp_path, "--config", str(path)).error.startswith(f"config: {path}{said}")


def test_a_missing_recipe_is_named_with_a_close_match(tmp_path: Path) -> None:
    wrong = CONFIGS / "quikstart.yaml"
    error = train(tmp_path, f"--config={wrong}").error
    assert error.startswith(f"config: cannot read {wrong} (No such file or directory)")
    assert error.endswith(f"did you mean {CONFIGS / 'quickstart.yaml'}?")
    assert "expected one argument" in train(tmp_path, "--config").error


def test_a_recipe_without_model_names_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("images: 10\n")
    assert train(tmp_path, "--config", str(path)).error == "data, model: required, and not given"


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("name", ["WidthFirst", "NoClasses", "Swapped"])
def test_networks_that_would_not_get_shape_and_classes_are_refused(tmp_path: Path, name: str) -> None:
    other = recipe(tmp_path, "      init_args: {width: 8, depth: 1}\n", "", "other.yaml")
    error = train(tmp_path, "--config", str(other), f"--model.net=foreign_networks.{name}").error
    assert error.startswith(f"model.net: foreign_networks.{name} must take shape and num_classes")


@pytest.mark.usefixtures("networks")
def test_a_mistake_in_the_users_own_network_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="positional arguments"):
        train(tmp_path, "--model.net=foreign_networks.TwoArguments")
    assert not runs_in(tmp_path)


@pytest.mark.parametrize("key", ["samples", "quality"])
def test_seeds_of_samples_are_looked_at_before_training(tmp_path: Path, key: str) -> None:
    assert train(tmp_path, f"--{key}.seed=-1").error == f"{key}.seed must lie in [0, 2^31), got -1"


@pytest.mark.usefixtures("networks")
def test_a_network_that_no_checkpoint_could_describe_is_refused_before_training(tmp_path: Path) -> None:
    error = train(tmp_path, "--model.net=foreign_networks.Forgetful").error
    assert error.startswith("Forgetful cannot be written into a checkpoint: keep its constructor argument 'width'")
    assert not runs_in(tmp_path)


def test_debug_mode_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMLIT_DEBUG", "1")
    with pytest.raises(ValueError, match=r"data\.batch_size must be at least 1"):
        train(tmp_path, "--data.batch_size=0")
    with pytest.raises(Exception, match="widht") as error:
        train(tmp_path, "--model.net.widht=3")
    assert error.value.__cause__ is not None


def test_what_is_no_mistake_of_the_user_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), errors.one_line_errors():
        _ = 1 // 0
    with pytest.raises(SystemExit) as end, errors.one_line_errors():
        raise FileError("disk full\nand more")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: disk full; and more\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a key: wrong"), 2, "error: a key: wrong"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'"),
        (TryAgainError("ranks [1] of 2 did not come"), 75, "error: ranks [1] of 2 did not come"),
        (writing_error("no room", OSError(errno.ENOSPC, "full")), 75, "error: no room"),
        (writing_error("not allowed", OSError(errno.EACCES, "no")), 2, "error: not allowed"),
        (LostProcessError("lost another process"), 1, "error: lost another process"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_takes_one_line(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str) -> None:
    with pytest.raises(SystemExit) as end, errors.one_line_errors():
        raise error
    assert end.value.code == code
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, ConnectionError, ImportError, FloatingPointError])
def test_what_keeps_its_traceback(kind: type[Exception]) -> None:
    with pytest.raises(kind, match="mine"), errors.one_line_errors():
        raise kind("mine")


@pytest.mark.parametrize("parents", [[100, 100, 100], [100, 100, 1], [100, 1, 1]])
def test_other_ranks_speak_only_where_rank_0_has_not_failed_as_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, parents: list[int]
) -> None:
    """Their parent, rank 0, stays, or ends while they wait, or has ended before they fail."""
    left = iter(parents)
    waited: list[float] = []
    monkeypatch.setattr(os, "getppid", lambda: next(left))
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    with pytest.raises(SystemExit) as end, errors.one_line_errors():
        raise UserError("no space left")
    assert end.value.code == 2
    assert waited == ([] if parents[1] == 1 else [errors.RANK_0_FIRST_S])
    assert capsys.readouterr().err == ("error: rank 3: no space left\n" if parents[2] == 100 else "")


def test_an_abstract_class_says_what_it_lacks(tmp_path: Path) -> None:
    error = train(tmp_path, "--model.path=fmlit.GaussianPath").error
    assert error.startswith("model.path: fmlit.GaussianPath is abstract: it lacks alpha, alpha_dot, beta, beta_dot")


@pytest.mark.parametrize("first", ["samples", "quality"])
def test_two_objects_of_one_class_are_told_apart(tmp_path: Path, first: str) -> None:
    """Both are equal but for what is nested in them, in lists, or said of the default."""
    quality = ("--quality.sampler=ODESampler", "--quality.sampler.steps=7")
    sampler = ("--samples.sampler.steps=7", *quality, f"--{first}.sampler.grid.rho=0")
    assert train(tmp_path, *sampler).error.startswith(f"{first}.sampler.grid: EDMGrid.rho must be positive")


def test_the_script_itself_ends_with_code_2_and_one_line_before_processes_start(tmp_path: Path) -> None:
    script = CONFIGS.parent / "scripts" / "train.py"
    options = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=5"]
    command = [sys.executable, str(script), "--config", str(recipe(tmp_path)), *options]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert ended.stdout == ""
    expected = "error: data.batch_size 5 is not divisible by 2 (2 processes x 1 accumulated batches): choose 4 or 6\n"
    assert ended.stderr == expected
    assert not runs_in(tmp_path)


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 1 GiB", "no room"])
def test_out_of_memory_on_a_gpu(said, tmp_path, monkeypatch):
    def out_of_memory(self, *_):
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr(FlowMatchingModule, "training_step", out_of_memory)
    error = train(tmp_path, "--config", str(recipe(tmp_path))).error
    asked = ", 2.50 GiB were asked for" if "2.50" in said else ""
    assert error.startswith(
        f"out of memory{asked}: lower data.batch_size (while scoring quality.batch_size), or raise "
    )
    assert runs_in(tmp_path) == []


def test_out_of_memory_for_real(tmp_path):
    """Weights of 400 terabytes."""
    options = ("--model.net", "fmlit.MLP", "--model.net.width", "10000000")
    error = train(tmp_path, "--config", str(recipe(tmp_path)), *options).error
    assert error.startswith("out of memory, 400000000000000 bytes were asked for: lower data.batch_size")
    assert runs_in(tmp_path) == []
