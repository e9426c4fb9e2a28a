"""Small networks, modules and training runs that several test files share."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor

from fmlit import Digits
from fmlit.data.data_module import DataModule
from fmlit.models.mlp import MLP
from fmlit.models.unet import UNet
from fmlit.storage.checkpoints import AtomicCheckpointIO
from fmlit.training.modules import FlowMatchingModule, GenerativeModule
from fmlit.training.optimizers import AdamW

tiny_unet = partial(UNet, channels=16, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=16)
tiny_mlp = partial(MLP, width=32, depth=1)


def digits_module(
    make: Callable[..., GenerativeModule] = FlowMatchingModule, net: Callable = tiny_mlp, **arguments: Any
) -> GenerativeModule:
    """A class-conditional model of the digits, with the same initial weights every time."""
    torch.manual_seed(0)
    defaults = {"shape": (1, 8, 8), "num_classes": 10, "conditional": True, "optimizer": AdamW(1e-3)}
    return make(net, **defaults | arguments)


def fit(
    module: GenerativeModule,
    folder: Path,
    steps: int,
    *callbacks: pl.Callback,
    data: DataModule | None = None,
    resume: Path | None = None,
    **settings: Any,
) -> pl.Trainer:
    """Train as ``scripts/train.py`` does, on the digits in batches of 12 unless other data are given."""
    ours = dict.fromkeys(("enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, **ours}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*srun.*|.*LeafSpec.*|.*fit.ckpt_path=.*")
        trainer = pl.Trainer(
            **defaults | settings,
            max_steps=steps,
            max_epochs=-1,
            callbacks=list(callbacks),
            default_root_dir=folder,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
        )
        trainer.fit(module, data or Digits(batch_size=12), ckpt_path=resume, weights_only=True)
    return trainer


def weights(module: GenerativeModule) -> dict[str, Tensor]:
    """A copy of the trained weights."""
    return {name: value.clone() for name, value in module.model.net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal in every bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Memory(Logger):
    """A logger that remembers."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self.pictures: list[tuple[str, int]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})

    def log_image(self, key, images, step):
        self.pictures.append((key, step))

    def log_hyperparams(self, *arguments, **settings): ...


def names(folder: Path, pattern: str = "*.ckpt") -> list[str]:
    """Names of the files in a folder."""
    return sorted(path.name for path in folder.glob(pattern))
