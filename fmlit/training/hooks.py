"""The base classes of fmlit's callbacks."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl

from fmlit.core.errors import UserError
from fmlit.core.processes import ProcessGroup
from fmlit.sampling.samplers import Sampler
from fmlit.training.lightning_internals import is_accumulating
from fmlit.training.modules import GenerativeModule

# Lightning declares the module of a hook as a LightningModule, and no override may narrow that. For a type checker this
# base is Any, so that the hooks of callbacks can say what ``Callback.setup`` makes sure of.
_Base: Any = pl.Callback


class Callback(_Base):
    """A callback that works with a ``GenerativeModule`` only, and says so when a fit starts."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if not isinstance(pl_module, GenerativeModule):
            name, other = type(self).__name__, type(pl_module).__name__
            raise UserError(f"{name} needs a module of fmlit, such as FlowMatchingModule, got {other}")


class EveryImages(Callback):
    """Run ``act`` whenever the number of images seen passes a multiple of ``every``, and at the last step.

    The interval is in images, so that a recipe means the same for any batch size. An error on one rank ends all of
    them, and names the cause. ``seconds`` is the time spent so far.

    Checkpoints are saved before the other actions of a step, and remember which of these were still to come. A run that
    is resumed from there makes up for what an interruption has cut short.
    """

    def __init__(self, every: int | None) -> None:
        if every is not None and every < 1:
            raise UserError(f"every must be a positive number of images, or null for never, got {every}")
        self.every = every
        self.seconds = 0.0
        self._acted_at = 0

    def setup(self, trainer: pl.Trainer, pl_module: GenerativeModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._acted_at = pl_module.images_seen  # an earlier fit does not count; a checkpoint is loaded after this

    def act(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        raise NotImplementedError

    def was_done(self, trainer: pl.Trainer, module: GenerativeModule) -> bool:
        """Whether an earlier launch of this run has acted at this very step. All ranks call it."""
        return False

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self._make_up(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self._make_up(trainer, pl_module)  # where nothing is left to train, which Lightning never starts

    def _make_up(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        """Act now if that was due at the step at which this run was interrupted."""
        if self.every is None or module.images_seen <= self._acted_at:
            return
        if self._is_due(trainer, module) and not self.was_done(trainer, module):
            self._act_now(trainer, module)
        self._acted_at = module.images_seen

    def _is_due(self, trainer: pl.Trainer, module: GenerativeModule) -> bool:
        assert self.every is not None
        passed = module.images_seen // self.every > self._acted_at // self.every
        return passed or trainer.global_step == trainer.max_steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        if self.every is None or is_accumulating(trainer):  # a checkpoint would fall between two steps
            return
        if self._is_due(trainer, pl_module):
            self._act_now(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        if self.every is not None and pl_module.images_seen > self._acted_at:  # Trainer.max_time or another early end
            self._act_now(trainer, pl_module)

    def _act_now(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        with self._pause(module):
            self.act(trainer, module)
        self._acted_at = module.images_seen

    def state_dict(self) -> dict[str, Any]:
        return {"acted_at": self._acted_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._acted_at = state_dict["acted_at"]

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
