"""What callbacks share that act every so many training images: when they are due, and what they log."""

import time
from typing import Any

import lightning.pytorch as pl

from fmlit.core.errors import UserError
from fmlit.core.processes import ProcessGroup
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.samplers import Sampler
from fmlit.training.averages import EMA
from fmlit.training.modules import GenerativeModule


class EveryImages(pl.Callback):
    """Runs ``act`` whenever the number of images seen passes a multiple of ``every``, and at the last step.

    Keyed by images, so that a recipe means the same for any batch size. What fails on one rank ends all of them, with
    the cause named. ``seconds`` is the time spent so far.
    """

    def __init__(self, every: int | None) -> None:
        if every is not None and every < 1:
            raise UserError(f"every must be a positive number of images, or null for never, got {every}")
        self.every = every
        self.seconds = 0.0
        self._acted_at = 0
        self._step = 0

    def act(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        raise NotImplementedError

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks, averages = trainer.callbacks, averages_of(trainer)  # type: ignore[attr-defined]
        if averages and callbacks.index(averages) > callbacks.index(self):
            raise UserError(f"list the EMA callback before {type(self).__name__}, which needs its averages up to date")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GenerativeModule)
        self._acted_at, self._step = pl_module.images_seen, trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, GenerativeModule)
        if self.every is None or trainer.global_step == self._step:
            return  # off, or gradients are still accumulating: a checkpoint would fall between two steps
        self._step = trainer.global_step
        passed = pl_module.images_seen // self.every > self._acted_at // self.every
        if passed or trainer.global_step == trainer.max_steps:
            self._timed_act(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GenerativeModule)
        if self.every is not None and pl_module.images_seen > self._acted_at:  # Trainer.max_time or another early end
            self._timed_act(trainer, pl_module)

    def _timed_act(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        started = time.perf_counter()
        self._acted_at = module.images_seen
        module.guard.check()  # nothing is drawn, scored or kept of a model that has come apart
        with ProcessGroup.current().fail_together():
            self.act(trainer, module)
        self.seconds += time.perf_counter() - started


def averages_of(trainer: pl.Trainer) -> EMA | None:
    """The trainer's EMA callback, if it has one."""
    return next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]


def sampled_model(trainer: pl.Trainer, module: GenerativeModule) -> GenerativeModel:
    """What to sample from: the first average where an EMA callback is there, else the trained weights."""
    averages = averages_of(trainer)
    return averages.model(module) if averages else module.model


def check_sampler(sampler: Sampler, module: GenerativeModule, key: str) -> None:
    """Raise a UserError with the key, before training, where the sampler cannot sample from the module's model."""
    try:
        sampler.check(module.model)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def log_metrics(trainer: pl.Trainer, module: GenerativeModule, metrics: dict[str, float]) -> None:
    """Write metrics to every logger, with ``images_seen`` beside them. Not through ``module.log``, whose float32 would
    round the count beyond 16.7 million images, and which only writes at its own steps."""
    for logger in trainer.loggers:
        logger.log_metrics({**metrics, "images_seen": module.images_seen}, step=trainer.global_step)
