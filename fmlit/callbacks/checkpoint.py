"""Checkpoints every so many images: the newest few, and ``last.ckpt``, which points at the newest."""

import logging
import os
from pathlib import Path
from typing import Literal, get_args

import lightning.pytorch as pl

from fmlit.callbacks.intervals import EveryImages
from fmlit.metrics.ranks import Ranks
from fmlit.modules import GenerativeModule

log = logging.getLogger(__name__)

OnError = Literal["abort", "continue"]


class Checkpoint(EveryImages):
    """Saves ``<run>/checkpoints/<images seen>.ckpt`` and at the end of training; keeps the newest ``keep``.

    Lightning's ModelCheckpoint counts in steps, and keeps either the newest or the best. Older checkpoints are removed
    only once a newer one is complete, so that a run killed at any moment has one to go on from. The best by a metric is
    kept by ``QualityCurve``, as ``best.ckpt``.

    Args:
        every: interval in training images; null for never.
        keep: number of checkpoints to keep.
        on_error: what a full disk or a lost mount means: "abort" the run, or warn and "continue" until the next is due,
            which risks all that is learnt in between.
    """

    def __init__(self, every: int | None = 500_000, keep: int = 2, on_error: OnError = "abort") -> None:
        super().__init__(every)
        if keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, got {keep}")
        if on_error not in get_args(OnError):
            raise ValueError(f"checkpoint.on_error must be one of {', '.join(get_args(OnError))}, got {on_error!r}")
        self.keep, self.on_error = keep, on_error
        self.newest: Path | None = None

    def now(self, trainer: pl.Trainer, module: GenerativeModule) -> Path | None:
        """Save outside of the interval, unless that was just done; returns the newest checkpoint."""
        if self._acted_at != module.images_seen or self.newest is None:
            self._timed_act(trainer, module)
        return self.newest

    def act(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        path = _folder(trainer) / _name(module.images_seen)
        if problem := save(trainer, path):
            if self.on_error == "abort":
                raise OSError(problem)
            if trainer.is_global_zero:
                log.warning("%s; training goes on", problem)
            return
        self.newest = path
        if trainer.is_global_zero:
            _point(_folder(trainer) / "last.ckpt", path)
            # As numbers: names grow longer at 10^9 images.
            seen = sorted(int(file.stem) for file in path.parent.glob("*.ckpt") if file.stem.isdigit())
            past = [images for images in seen if images <= module.images_seen]
            for images in seen:  # those ahead were left by a run that was resumed from before them
                if images not in past[-self.keep :]:
                    trainer.strategy.remove_checkpoint(path.parent / _name(images))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GenerativeModule)
        current = _folder(trainer) / _name(pl_module.images_seen)
        if trainer.is_global_zero and current.exists():  # resumed from a checkpoint that a kill left without the link
            _point(current.with_name("last.ckpt"), current)


def save(trainer: pl.Trainer, path: Path) -> str:
    """Save a checkpoint; all ranks call it. Returns why that failed, on every rank, or nothing."""
    problem = ""
    try:
        trainer.save_checkpoint(path)
    except OSError as error:  # on rank 0, which writes
        problem = str(error)
        trainer.strategy.barrier("Trainer.save_checkpoint")  # where the others wait for it
    return Ranks.current().from_first(lambda: problem)


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"


def _name(images_seen: int) -> str:
    return f"{images_seen:09d}.ckpt"


def _point(link: Path, target: Path) -> None:
    """Make ``link`` a relative symbolic link to ``target``, in one step."""
    part = link.with_suffix(".part")
    part.unlink(missing_ok=True)
    part.symlink_to(target.name)
    os.replace(part, link)
