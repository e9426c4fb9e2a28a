"""Every recipe that ships builds as it stands, says what it is, and keeps to the style."""

import inspect
import math
import pydoc
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml

import fmlit
from fmlit.cli import train
from fmlit.cli.parsing import LINKS
from fmlit.training.loggers import MetricsFile
from tests.helpers.tiny_cli import CONFIGS

RECIPES = sorted(CONFIGS.glob("*.yaml"))

# Parameters of the networks, where the field's are known: torchcfm's U-Net for CIFAR-10.
PARAMETERS = {"cifar10_flow": 35_746_307, "cifar10_score": 35_746_307}


def names(value: Any) -> list[str]:
    """All keys at any depth."""
    if not isinstance(value, dict):
        return []
    return [*value, *(name for inner in value.values() for name in names(inner))]


# How each recipe samples its pictures and, where that differs, its scores.
SAMPLERS = {
    "cifar10_cpu": ("ipndm10+uniform",),
    "cifar10_flow": ("midpoint18+uniform",),
    "cifar10_score": ("eulermaruyama250+reverse", "midpoint18"),
    "cifar10_speedrun": ("ipndm10+uniform+bfloat16",),
    "mnist_cpu": ("midpoint10+uniform",),
    "mnist_flow": ("midpoint10+uniform",),
    "mnist_score": ("eulermaruyama250+reverse", "midpoint18"),
    "quickstart": ("midpoint5+uniform",),
    "toy_checkerboard": ("midpoint18+uniform",),
    "toy_two_points": ("midpoint18+uniform",),
}


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_the_promised_recipes_are_there() -> None:
    expected = {"quickstart", "mnist_cpu", "mnist_flow", "mnist_score"}
    expected |= {"cifar10_cpu", "cifar10_flow", "cifar10_score", "cifar10_speedrun"}
    assert expected <= {path.stem for path in RECIPES}


@pytest.mark.filterwarnings("ignore")
def test_it_builds_with_one_config_and_nothing_else(path: Path, tmp_path: Path) -> None:
    """Model, data, callbacks, loggers and trainer; nothing is downloaded, read or started by that."""
    content = yaml.safe_load(path.read_text())
    built = train.TrainingCLI(["--config", str(path), "--runs", str(tmp_path)])
    assert built.run_folder.path == tmp_path / path.stem
    assert type(built.model).__name__ == content["model"]["class_path"].rpartition(".")[2]
    assert built.model.model.shape == built.datamodule.shape
    conditional = content["model"]["init_args"].get("conditional", False)
    assert built.model.model.num_classes == (built.datamodule.num_classes if conditional else None)
    assert built.model.schedule.images == content["images"]
    assert built.trainer.max_steps == math.ceil(content["images"] / built.datamodule.batch_size)
    assert isinstance(built.trainer.loggers[0], MetricsFile)
    pictures, scores = (built.config_init[part].sampler for part in ("samples", "quality"))
    assert pictures.name == SAMPLERS[path.stem][0]
    assert scores.name == SAMPLERS[path.stem][-1]
    if path.stem in PARAMETERS:
        assert sum(p.numel() for p in built.model.model.net.parameters()) == PARAMETERS[path.stem]

    built.discard()
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_pictures_and_scores_share_a_sampler_unless_told_otherwise(tmp_path: Path) -> None:
    def samplers(*options: str) -> tuple[str, str]:
        built = train.TrainingCLI(["--config", str(CONFIGS / "quickstart.yaml"), "--runs", str(tmp_path), *options])
        built.discard()
        return built.config_init["samples"].sampler.name, built.config_init["quality"].sampler.name

    assert samplers("--samples.sampler.steps=3") == ("midpoint3+uniform", "midpoint3+uniform")
    assert samplers("--quality.sampler=ODESampler") == ("midpoint5+uniform", "heun18")
    assert samplers("--quality.sampler=ODESampler", "--quality.sampler.steps=9") == ("midpoint5+uniform", "heun9")


def test_the_quickstart_needs_no_account_and_the_real_recipes_name_wandb(path: Path) -> None:
    logger = (yaml.safe_load(path.read_text()).get("trainer") or {}).get("logger") or {}
    if path.stem.startswith(("mnist", "cifar10")):
        assert logger["class_path"] == "fmlit.WandbLogger"
    if path.stem == "quickstart":
        assert not logger


def test_it_begins_with_what_it_is_and_explains_its_length(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert re.match(r"# \w.{30,}", lines[0])
    (images,) = [line for line in lines if line.startswith("images:")]
    assert "#" in images
    assert max(len(line) for line in lines) <= 125


def test_it_sets_nothing_that_belongs_to_a_launch_or_is_linked(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert not {"runs", "name", "resume"} & content.keys()
    linked = {key.rpartition(".")[2] for key in LINKS}
    assert not linked & set(names(content["model"]))
    assert "seed" not in names(content["data"])
    assert not {"devices", "accelerator", "strategy", "num_nodes"} & set(names(content.get("trainer")))


def defaults(cls: type) -> dict[str, Any]:
    """The defaults of a constructor, inherited ones included where it passes them on."""
    found: dict[str, Any] = {}
    for base in reversed([base for base in inspect.getmro(cls) if "__init__" in vars(base)]):
        found |= {name: parameter.default for name, parameter in inspect.signature(base).parameters.items()}
    return found


def repeated(value: Any, cls: type, key: str) -> Iterator[str]:
    """Keys of a recipe at which it says what a signature says already."""
    for name, given in value.items():
        default = defaults(cls).get(name)
        if isinstance(given, dict) and "class_path" in given:
            inner = pydoc.locate(given["class_path"])
            yield from repeated(given.get("init_args", {}), inner, f"{key}.{name}")
        elif isinstance(given, dict) and is_dataclass(default):
            yield from repeated(given, type(default), f"{key}.{name}")
        elif isinstance(given, str) and isinstance(pydoc.locate(given), type):
            if type(default) is pydoc.locate(given):
                yield f"{key}.{name}"
        elif (list(default) if isinstance(default, tuple) else default) == given:
            yield f"{key}.{name}"


def test_it_holds_only_what_differs_from_the_defaults(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    parts = {"trainer": pl.Trainer, **train.PARTS}
    found = [key for part in content.keys() & parts for key in repeated(content[part], parts[part], part)]
    for part in ("model", "data"):
        found += repeated(content[part].get("init_args", {}), pydoc.locate(content[part]["class_path"]), part)
    assert not found
    assert [*repeated({"keep": 2, "every": 3}, train.PARTS["checkpoint"], "x")] == ["x.keep"]
    schedule = {"schedule": {"decay": "constant", "warmup_images": 3}}
    assert [*repeated(schedule, fmlit.FlowMatchingModule, "model")] == ["model.schedule.decay"]
