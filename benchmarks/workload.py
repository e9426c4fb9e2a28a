"""What all contenders train: network, data, batch and settings of a recipe, read off what train.py builds of it."""

import copy
import difflib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric.utilities.throughput import measure_flops
from torch import Tensor

import fmlit
from fmlit.cli.train import TrainingCLI
from fmlit.core.errors import UserError
from fmlit.flows.paths import CondOTPath
from fmlit.flows.predictions import Velocity
from fmlit.flows.times import UniformTime
from fmlit.models.compilation import CompileMode
from fmlit.models.unet import UNet
from fmlit.training.averages import EMA
from fmlit.training.modules import FlowMatchingModule

CLONE = Path(fmlit.__file__).parent.parent
NETS = {"cifar10": "cifar10_flow.yaml", "small": "quickstart.yaml"}
# What is no part of a training step, and what the other loops do not do.
OFF = ("--samples.every=null", "--quality.every=null", "--checkpoint.every=null", "--trainer.logger=false")
PLAIN = ("--model.optimizer=fmlit.AdamW", "--model.learned_loss_weight=false")


def recipe(net: str) -> Path:
    """The recipe of a network's name, or the file itself.

    Raises:
        ValueError: there is no such name or file, or fmlit was installed without its recipes.
    """
    path = CLONE / "configs" / NETS[net] if net in NETS else Path(net)
    if path.is_file():
        return path
    if net in NETS:
        raise UserError(f"net: there is no {path}: run the benchmark from a clone of the repository")
    near = difflib.get_close_matches(net, NETS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"net: {net} is neither {' nor '.join(NETS)} nor the YAML file of a recipe{hint}")


@dataclass(frozen=True)
class Setup:
    """What the command line says of the workload; small enough to be sent to another process.

    Attributes:
        recipe: YAML file.
        device: ``cpu`` or ``cuda:0``.
        batch_size: images per step; None is the recipe's.
        precision: Lightning's name; None is what train.py chooses.
        threads: of PyTorch; None is its own choice.
        compile: mode of torch.compile for the network; None is the recipe's.
        channels_last: format of kernels and activations; None is the recipe's.
    """

    recipe: Path
    device: str
    batch_size: int | None = None
    precision: str | None = None
    threads: int | None = None
    compile: CompileMode | None = None
    channels_last: bool | None = None

    def build(self, steps: int, runs: str | Path, devices: int | None = None) -> TrainingCLI:
        """Model, data and Trainer for so many steps, as train.py builds them; the run folder goes into ``runs``.

        Nothing is drawn, scored or saved on the way, W&B is off, and the optimizer is AdamW; ``devices`` is the number
        of processes.
        """
        device = torch.device(self.device)
        chosen = devices or (f"[{device.index or 0}]" if device.type == "cuda" else 1)
        args = [f"--config={self.recipe}", f"--runs={runs}", *OFF, *PLAIN, f"--trainer.max_steps={steps}"]
        args += [f"--trainer.accelerator={device.type}", f"--trainer.devices={chosen}"]
        args += ["--trainer.accumulate_grad_batches=1"]
        args += ["--trainer.strategy=ddp"] if devices else []
        args += [] if self.batch_size is None else [f"--data.batch_size={self.batch_size}"]
        given = {
            "trainer.precision": self.precision,
            "model.execution.compile": self.compile,
            "model.execution.channels_last": self.channels_last,
        }
        args += [f"--{key}={str(value).lower()}" for key, value in given.items() if value is not None]
        with quiet():
            return TrainingCLI(args)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's advice; see train.py."""
    for name in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # The last is of the worker processes that others' examples ask for.
        for advice in (
            ".*args param.*",
            ".*many workers.*",
            ".*tensorboardX.*",
            ".*LeafSpec.*",
            ".*srun.*",
            ".*worker pro.*",
        ):
            warnings.filterwarnings("ignore", advice)
        yield


@dataclass(frozen=True)
class Workload:
    """Network, data and settings, for loops that are written without Lightning.

    Attributes:
        net: the network with its initial weights, on the CPU; every loop trains a copy.
        images: uint8 (N, C, H, W), on the CPU.
        labels: int64 (N,).
        conditional: whether the network takes labels.
        label_drop: share of them that the null label replaces.
        flip: whether images are mirrored with probability 1/2.
        batch_size: images per step.
        device: where to train.
        mixed: whether the forward pass runs in bfloat16.
        learning_rate: after warm-up; ``factor(images_seen)`` is what is left of it then.
        betas: AdamW's.
        weight_decay: AdamW's.
        clip: largest norm of the gradient, or None.
        half_lives: of the averages of the weights, in images.
        ramp: largest half-life as a share of the images seen.
        compile: mode of torch.compile for the network, or None.
        channels_last: whether kernels and activations are kept in that format.
    """

    net: UNet
    images: Tensor
    labels: Tensor
    conditional: bool
    label_drop: float
    flip: bool
    batch_size: int
    device: torch.device
    mixed: bool
    learning_rate: float
    factor: Callable[[float], float]
    betas: tuple[float, float]
    weight_decay: float
    clip: float | None
    half_lives: tuple[int, ...]
    ramp: float
    compile: CompileMode | None
    channels_last: bool

    @classmethod
    def of(cls, cli: TrainingCLI, device: torch.device) -> "Workload":
        """
        Raises:
            ValueError: the recipe asks for what the loops of the benchmark do not do.
        """
        module, data, trainer = cli.model, cli.datamodule, cli.trainer
        _check(module, trainer.precision)
        (average,) = (part for part in trainer.callbacks if isinstance(part, EMA))  # type: ignore[attr-defined]
        data.prepare_data()
        dataset = data.dataset("train")
        images, labels = dataset.batch(range(len(dataset)))
        return cls(
            net=copy.deepcopy(module.model.net),
            images=images,
            labels=labels,
            conditional=module.model.num_classes is not None,
            label_drop=module.draws.label_drop,
            flip=data.horizontal_flip,
            batch_size=data.batch_size,
            device=device,
            mixed=trainer.precision == "bf16-mixed",
            learning_rate=module.optimizer.learning_rate,
            factor=module.schedule.factor,
            betas=module.optimizer.betas,
            weight_decay=module.optimizer.weight_decay,
            clip=trainer.gradient_clip_val,
            half_lives=average.half_lives,
            ramp=average.ramp,
            compile=module.execution.compile,
            channels_last=module.execution.channels_last,
        )

    def flops(self) -> int:
        """Of training on one image, as models are counted: three times those of the network, multiplications and
        additions apart, whatever is computed around it or twice."""
        one = copy.deepcopy(self.net).to("meta")
        inputs = [torch.empty(1, *self.images.shape[1:]), torch.empty(1)]
        labels = torch.zeros(1, dtype=torch.int64, device="meta") if self.conditional else None
        return 3 * measure_flops(one, lambda: one(*(tensor.to("meta") for tensor in inputs), labels))


def _check(module: object, precision: str) -> None:
    if not isinstance(module, FlowMatchingModule):
        raise UserError(f"net: the benchmark trains by flow matching, and the recipe by {type(module).__name__}")
    model = module.model
    times = module.draws.time_distribution
    parts = {UNet: model.net, CondOTPath: model.path, Velocity: model.prediction, UniformTime: times}
    for kind, part in parts.items():
        if type(part) is not kind:
            raise UserError(f"net: the benchmark compares recipes of a {kind.__name__}, not of a {type(part).__name__}")
    if precision not in ("32-true", "bf16-mixed"):
        raise UserError(f"precision: the benchmark compares 32-true and bf16-mixed, not {precision}")
