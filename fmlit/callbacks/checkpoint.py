"""Checkpoints every so many images: the newest few, and ``last.ckpt``, which points at the newest."""

import os
from pathlib import Path

import lightning.pytorch as pl

from fmlit.callbacks.intervals import EveryImages
from fmlit.modules import GenerativeModule


class Checkpoint(EveryImages):
    """Saves ``<run>/checkpoints/<images seen>.ckpt`` and at the end of training; keeps the newest ``keep``.

    Lightning's ModelCheckpoint counts in steps, and keeps either the newest or the best. Older checkpoints are removed
    only once a newer one is complete, so that a run killed at any moment has one to go on from. The best by a metric is
    kept by ``QualityCurve``, as ``best.ckpt``.

    Args:
        every: interval in training images; null for never.
        keep: number of checkpoints to keep.
    """

    def __init__(self, every: int | None = 500_000, keep: int = 2) -> None:
        super().__init__(every)
        if keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, got {keep}")
        self.keep = keep
        self.newest: Path | None = None

    def act(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        folder = Path(trainer.default_root_dir) / "checkpoints"
        self.newest = folder / _name(module.images_seen)
        trainer.save_checkpoint(self.newest)  # on all ranks: it waits for them
        if trainer.is_global_zero:
            _point(folder / "last.ckpt", self.newest)
            # As numbers: names grow longer at 10^9 images.
            seen = sorted(int(path.stem) for path in folder.glob("*.ckpt") if path.stem.isdigit())
            past = [images for images in seen if images <= module.images_seen]
            for images in seen:  # those ahead were left by a run that was resumed from before them
                if images not in past[-self.keep :]:
                    trainer.strategy.remove_checkpoint(folder / _name(images))


def _name(images_seen: int) -> str:
    return f"{images_seen:09d}.ckpt"


def _point(link: Path, target: Path) -> None:
    """Make ``link`` a relative symbolic link to ``target``, in one step."""
    part = link.with_suffix(".part")
    part.unlink(missing_ok=True)
    part.symlink_to(target.name)
    os.replace(part, link)
