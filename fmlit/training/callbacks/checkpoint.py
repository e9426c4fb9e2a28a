"""Checkpoints every so many images: the newest few, those to keep, and ``last.ckpt``, which points at the newest."""

import itertools
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl

from fmlit.core.errors import FileError, UserError
from fmlit.core.processes import ProcessGroup
from fmlit.data.data_module import DataModule
from fmlit.storage.descriptions import describe
from fmlit.training.callbacks.intervals import EveryImages
from fmlit.training.modules import GenerativeModule

log = logging.getLogger(__name__)

OnError = Literal["abort", "continue"]


class Checkpoint(EveryImages):
    """Saves ``<run>/checkpoints/<images seen>.ckpt`` and at the end of training; keeps the newest ``keep``.

    Lightning's ModelCheckpoint counts in steps, and keeps either the newest or the best. Older checkpoints are removed
    only once a newer one is complete, so that a run killed at any moment has one to go on from. The best by a metric is
    kept by ``QualityCurve``, as ``best.ckpt``.

    A milestone is saved as ``milestone-<images seen>.ckpt`` after the first optimiser step at which so many images have
    been seen, and never removed: the weaker model of autoguidance, a point to compare at, a start for other runs. It is
    a checkpoint like any other, from which the run may go on.

    Args:
        every: interval in training images; null for never.
        keep: number of checkpoints to keep.
        on_error: what a full disk or a lost mount means: "abort" the run, or warn and "continue" until the next is due,
            which risks all that is learnt in between.
        milestones: numbers of training images, increasing, at which a checkpoint is kept for good.
    """

    def __init__(
        self,
        every: int | None = 500_000,
        keep: int = 2,
        on_error: OnError = "abort",
        milestones: Sequence[int] = (),
    ) -> None:
        super().__init__(every)
        if keep < 1:
            raise UserError(f"checkpoint.keep must be at least 1, got {keep}")
        if on_error not in get_args(OnError):
            raise UserError(f"checkpoint.on_error must be one of {', '.join(get_args(OnError))}, got {on_error!r}")
        if any(later <= earlier for earlier, later in itertools.pairwise((0, *milestones))):
            raise UserError(
                f"checkpoint.milestones must be positive numbers of images, each larger than the one before, "
                f"got {list(milestones)}"
            )
        self.keep, self.on_error, self.milestones = keep, on_error, tuple(milestones)
        self.newest: Path | None = None
        self._looked_at: int | None = None  # images seen when milestones were last looked for

    def now(self, trainer: pl.Trainer, module: GenerativeModule) -> Path | None:
        """Save outside of the interval, unless that was just done; returns the newest checkpoint."""
        if self._acted_at != module.images_seen or self.newest is None:
            self._timed_act(trainer, module)
        return self.newest

    def act(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        path = _folder(trainer) / _name(module.images_seen)
        if self._save(trainer, path) and trainer.is_global_zero:
            # As numbers: names grow longer at 10^9 images.
            seen = sorted(int(file.stem) for file in path.parent.glob("*.ckpt") if file.stem.isdigit())
            past = [images for images in seen if images <= module.images_seen]
            for images in seen:  # those ahead were left by a run that was resumed from before them
                if images not in past[-self.keep :]:
                    trainer.strategy.remove_checkpoint(path.parent / _name(images))

    def _save(self, trainer: pl.Trainer, path: Path) -> bool:
        """Save the newest checkpoint; returns whether that went well, and raises a FileError if it must."""
        if problem := save(trainer, path):
            if self.on_error == "abort":
                raise FileError(problem)
            if trainer.is_global_zero:
                log.warning("%s; training goes on", problem)
            return False
        self.newest = path
        if trainer.is_global_zero:
            _point(path.with_name("last.ckpt"), path)
        return True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GenerativeModule)
        describe(pl_module.model)  # fails now, rather than at the first save, if there is something that it cannot
        if isinstance(data := trainer.datamodule, DataModule):  # type: ignore[attr-defined]
            describe(data)
        if trainer.is_global_zero:  # resumed from a checkpoint that a kill left without the link
            names = [_name(pl_module.images_seen), _milestone(pl_module.images_seen)]
            if trainer.ckpt_path and Path(trainer.ckpt_path).parent.resolve() == _folder(trainer).resolve():
                names.append(Path(trainer.ckpt_path).resolve().name)
            for name in names:
                if (current := _folder(trainer) / name).exists():
                    _point(current.with_name("last.ckpt"), current)
                    break

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, GenerativeModule)
        if self._looked_at is None:
            self._looked_at = pl_module.images_seen
        self._save_milestone(trainer, pl_module)  # best.ckpt of this very step was saved, and then the run was killed

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, GenerativeModule)
        if trainer.global_step != self._step:  # not between two steps, while gradients accumulate
            self._save_milestone(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._step = trainer.global_step  # which stands still there without an interval

    def _save_milestone(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        """Save one if it is due since the last look, which every checkpoint remembers."""
        assert self._looked_at is not None
        looked_at, self._looked_at = self._looked_at, module.images_seen
        if not any(looked_at < images <= module.images_seen for images in self.milestones):
            return
        started = time.perf_counter()
        module.guard.check()
        with ProcessGroup.current().fail_together():
            self._save(trainer, _folder(trainer) / _milestone(module.images_seen))
        self.seconds += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        return {"looked_at": self._looked_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._looked_at = state_dict["looked_at"]


def save(trainer: pl.Trainer, path: Path) -> str:
    """Save a checkpoint; all ranks call it. Returns why that failed, on every rank, or nothing."""
    failure: Exception | None = None
    try:
        trainer.save_checkpoint(path)
    except Exception as error:  # on rank 0, which writes, or on all
        failure = error
        trainer.strategy.barrier("Trainer.save_checkpoint")  # where the others wait for it
    problem = ProcessGroup.current().from_first(lambda: "" if failure is None else str(failure) or repr(failure))
    if failure is not None and not (isinstance(failure, OSError) and trainer.is_global_zero):
        raise failure  # of what is to be saved, not of the disk; the other ranks hear of it when they are done
    return problem


def goes_on_without(trainer: pl.Trainer) -> bool:
    """Whether training goes on where a checkpoint cannot be written."""
    return any(c.on_error == "continue" for c in trainer.callbacks if isinstance(c, Checkpoint))  # type: ignore[attr-defined]


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"


def _name(images_seen: int) -> str:
    return f"{images_seen:09d}.ckpt"


def _milestone(images_seen: int) -> str:
    return f"milestone-{_name(images_seen)}"


def _point(link: Path, target: Path) -> None:
    """Make ``link`` a relative symbolic link to ``target``, in one step; a file of that name is its own target."""
    if link.name == target.name:
        return
    part = link.with_suffix(".part")
    part.unlink(missing_ok=True)
    part.symlink_to(target.name)
    os.replace(part, link)
