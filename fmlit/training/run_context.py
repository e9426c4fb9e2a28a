"""What the module and the callbacks of a run share. Each finds it as ``module.run``."""

from pathlib import Path
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor

from fmlit.data.data_module import DataModule
from fmlit.models.generative_model import GenerativeModel
from fmlit.storage.run_folder import RunFolder
from fmlit.training.gradients import GradientGuard


class Averages(Protocol):
    """What others use of the EMA callback."""

    def update(self, module: Any, step: int) -> None: ...
    def model(self, module: Any, name: str | None = None) -> GenerativeModel: ...
    def averaged_weights(self) -> dict[str, dict[str, Tensor]]: ...


class Checkpoints(Protocol):
    """What others use of the Checkpoint callback."""

    on_error: Literal["abort", "continue"]

    def save_now(self, trainer: pl.Trainer, module: Any) -> Path | None: ...


class RunContext:
    """One run of a module with one Trainer.

    A callback offers what it has in its ``setup``. Others read it in later hooks, so that the order in which callbacks
    are listed does not matter for it.

    Attributes:
        guard: watches losses and gradients for values that are not finite.
        module: the module, a ``GenerativeModule``.
        trainer: its Trainer; None for a module on its own.
        averages: the EMA callback, if there is one.
        checkpoints: the Checkpoint callback, if there is one.
        latest: the newest values of the training log.
        pause_seconds: the time that callbacks have taken so far, to sample, score and save.
    """

    def __init__(self, module: Any, trainer: Any) -> None:
        self.module, self.trainer = module, trainer
        self.guard = GradientGuard()
        self.averages: Averages | None = None
        self.checkpoints: Checkpoints | None = None
        self.latest: dict[str, float] = {}
        self.pause_seconds = 0.0

    @property
    def folder(self) -> RunFolder:
        """Where the run lives: the Trainer's ``default_root_dir``."""
        return RunFolder(Path(self.trainer.default_root_dir))

    @property
    def data(self) -> DataModule | None:
        """The data, unless they come from plain data loaders or from a data module of another kind."""
        data = self.trainer.datamodule
        return data if isinstance(data, DataModule) else None

    @property
    def sampled_weights(self) -> str:
        """The weights that samples come from, by the name that protocol strings use."""
        return "raw" if self.averages is None else "ema"

    def sampled_model(self) -> GenerativeModel:
        """The model to sample from: with the first average where there is an EMA callback, else the trained one."""
        if self.averages is None:
            return self.module.model
        self.averages.update(self.module, self.trainer.global_step)
        return self.averages.model(self.module)

    def log(self, metrics: dict[str, float]) -> None:
        """Write metrics to every logger, with ``images_seen`` beside them, and show them to Lightning's callbacks.

        Not through ``module.log``: its float32 would round the count beyond 16.7 million images, and it writes only at
        steps of its own.
        """
        for logger in self.trainer.loggers:
            logger.log_metrics({**metrics, "images_seen": self.module.images_seen}, step=self.trainer.global_step)
        shown = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
        self.trainer.callback_metrics.update(shown)
        for callback in self.trainer.early_stopping_callbacks:
            if callback.monitor in metrics:
                # Lightning looks only at the end of an epoch, and a run is one endless epoch.
                callback.on_train_epoch_end(self.trainer, self.module)
