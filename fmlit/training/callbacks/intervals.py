"""What callbacks share that act every so many training images."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl

from fmlit.core.errors import UserError
from fmlit.core.processes import ProcessGroup
from fmlit.sampling.samplers import Sampler
from fmlit.training.hooks import Callback
from fmlit.training.modules import GenerativeModule


class EveryImages(Callback):
    """Run ``act`` whenever the number of images seen passes a multiple of ``every``, and at the last step.

    The interval is in images, so that a recipe means the same for any batch size. An error on one rank ends all of
    them, and names the cause. ``seconds`` is the time spent so far.
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

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self._acted_at, self._step = pl_module.images_seen, trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: GenerativeModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every is None or trainer.global_step == self._step:
            return  # off, or gradients are still accumulating: a checkpoint would fall between two steps
        self._step = trainer.global_step
        passed = pl_module.images_seen // self.every > self._acted_at // self.every
        if passed or trainer.global_step == trainer.max_steps:
            self._act_now(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        if self.every is not None and pl_module.images_seen > self._acted_at:  # Trainer.max_time or another early end
            self._act_now(trainer, pl_module)

    def _act_now(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        self._acted_at = module.images_seen
        with self._pause(module):
            self.act(trainer, module)

    @contextlib.contextmanager
    def _pause(self, module: GenerativeModule) -> Iterator[None]:
        """Do the block on all ranks or none, and count its time as a pause in training."""
        started = time.perf_counter()
        module.run.guard.check()  # a model with broken weights is not sampled, scored or saved
        with ProcessGroup.current().fail_together():
            yield
        seconds = time.perf_counter() - started
        self.seconds += seconds
        module.run.pause_seconds += seconds


def check_sampler(sampler: Sampler, module: GenerativeModule, key: str) -> None:
    """Raise a UserError with the key, before training, if the sampler cannot sample from the module's model."""
    try:
        sampler.check(module.model)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
