"""Checkpoints every so many images: the newest few, milestones to keep, and a link to the newest of all."""

import contextlib
import itertools
import logging
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl

from fmlit.core.errors import FileError, StorageError, UserError, writing_error
from fmlit.core.files import check_owner, move
from fmlit.core.processes import ProcessGroup
from fmlit.storage.descriptions import describe
from fmlit.storage.run_folder import RunFolder
from fmlit.training.hooks import EveryImages
from fmlit.training.lightning_internals import is_accumulating
from fmlit.training.modules import GenerativeModule

log = logging.getLogger(__name__)

OnError = Literal["abort", "continue"]


class Checkpoint(EveryImages):
    """Save a checkpoint every so many images and at the end of training, and keep the newest ``keep``.

    Lightning's ModelCheckpoint counts in steps, and keeps either the newest or the best. Here an older checkpoint is
    removed only once a newer one is complete, so that a run killed at any moment has one to continue from. The best by
    a metric is saved by ``QualityCurve``.

    A milestone is saved after the first optimizer step at which so many images have been seen, and never removed. It
    can be the weaker model of autoguidance, a point of comparison, or the start of other runs. The run can continue
    from it as from any other checkpoint.

    Args:
        every: interval in training images; null for never.
        keep: number of checkpoints to keep.
        on_error: what to do about a full disk or a lost mount: "abort" the run, or warn and "continue" until the next
            checkpoint is due, which risks all that is learned in between. The last checkpoint of a run must be saved.
        milestones: numbers of training images, increasing, at which a checkpoint is kept for good.
    """

    def __init__(
        self, every: int | None = 500_000, keep: int = 2, on_error: OnError = "abort", milestones: Sequence[int] = ()
    ) -> None:
        super().__init__(every)
        if keep < 1:
            raise UserError(f"checkpoint.keep must be at least 1, got {keep}")
        if on_error not in get_args(OnError):
            raise UserError(f"checkpoint.on_error must be one of {', '.join(get_args(OnError))}, got {on_error!r}")
        if any(later <= earlier for earlier, later in itertools.pairwise((0, *milestones))):
            rule = "must be positive numbers of images, each larger than the one before"
            raise UserError(f"checkpoint.milestones {rule}, got {list(milestones)}")
        self.keep, self.on_error, self.milestones = keep, on_error, tuple(milestones)
        self.newest: Path | None = None
        self._failed = False  # the last save of the interval
        self._looked_at: int | None = None  # images seen when milestones were last looked for

    def setup(self, trainer: pl.Trainer, pl_module: GenerativeModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.newest, self._failed, self._looked_at = None, False, None
        pl_module.run.checkpoints = self

    def save_now(self, trainer: pl.Trainer, module: GenerativeModule) -> Path | None:
        """Save outside of the interval, unless that was just done. Returns the newest checkpoint."""
        if self._acted_at != module.images_seen or self.newest is None:
            self._act_now(trainer, module)
        return self.newest

    def was_done(self, trainer: pl.Trainer, module: GenerativeModule) -> bool:
        """It is the checkpoint that this run starts from."""
        return True

    def act(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        folder = module.run.folder
        self._acted_at = module.images_seen  # for the checkpoint itself, which a resumed run need not save again
        self._failed = not self._save(trainer, folder, folder.checkpoint(module.images_seen))
        if not self._failed and trainer.is_global_zero:
            saved = folder.saved_images()
            past = [images for images in saved if images <= module.images_seen]
            for images in saved:  # those ahead were left by a run that was resumed from before them
                if images not in past[-self.keep :]:
                    trainer.strategy.remove_checkpoint(folder.checkpoint(images))

    def _save(self, trainer: pl.Trainer, folder: RunFolder, path: Path, on_error: OnError | None = None) -> bool:
        """Save the newest checkpoint, and return whether that worked."""
        saved = save(trainer, path, on_error or self.on_error, folder.last)
        if saved:
            self.newest = path
        return saved

    def on_fit_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        run = pl_module.run
        describe(pl_module.model)  # fails now, rather than at the first save, if there is something that it cannot
        if run.data is not None:
            describe(run.data)
        if trainer.is_global_zero:  # a kill may have left the checkpoint that this run starts from without the link
            current = [run.folder.checkpoint(pl_module.images_seen), run.folder.milestone(pl_module.images_seen)]
            if trainer.ckpt_path and Path(trainer.ckpt_path).parent.resolve() == run.folder.checkpoints.resolve():
                current.append(run.folder.checkpoints / Path(trainer.ckpt_path).resolve().name)
            if existing := [path for path in current if path.exists()]:
                try:
                    link(run.folder.last, existing[0])
                except OSError as error:  # a resume finds the checkpoint without it, and the next save tries again
                    log.warning("%s; training goes on", error)

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._save_milestone(trainer, pl_module)  # in case a kill came between best.ckpt of this very step and this

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        if not is_accumulating(trainer):
            self._save_milestone(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module)

    def _save_milestone(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        """Save one if it is due since the last look, which every checkpoint remembers."""
        looked_at, self._looked_at = self._looked_at, module.images_seen
        if looked_at is not None and any(looked_at < images <= module.images_seen for images in self.milestones):
            with self._pause(module):
                self._save(trainer, module.run.folder, module.run.folder.milestone(module.images_seen))

    def on_train_end(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._failed:  # a run whose end is nowhere has not ended well
            self._save(trainer, pl_module.run.folder, pl_module.run.folder.checkpoint(pl_module.images_seen), "abort")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "looked_at": self._looked_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._looked_at = state_dict["looked_at"]


def save(trainer: pl.Trainer, path: Path, on_error: OnError, name: Path | None = None) -> bool:
    """Save a checkpoint, and return on every rank whether that worked. All ranks call it.

    Args:
        trainer: whose state is saved.
        path: the file.
        on_error: what to do where it cannot be written.
        name: a link to it, which is made or replaced as a part of the save.

    Raises:
        FileError: it did not work, and the run must end.
    """
    failure: Exception | None = None
    try:
        trainer.save_checkpoint(path)
    except Exception as error:  # on rank 0, which writes, or on all
        failure = error
        trainer.strategy.barrier("Trainer.save_checkpoint")  # where the others wait for it
    if failure is None and name is not None and trainer.is_global_zero:
        try:
            link(name, path)
        except Exception as error:
            failure = error

    def report() -> tuple[str, bool]:
        return "" if failure is None else str(failure) or repr(failure), isinstance(failure, StorageError)

    problem, passing = ProcessGroup.current().from_first(report)
    if failure is not None and not (isinstance(failure, OSError) and trainer.is_global_zero):
        raise failure  # of what is to be saved, not of the disk; the other ranks hear of it when they are done
    if problem and on_error == "abort":
        raise (StorageError if passing else FileError)(problem)
    if problem and trainer.is_global_zero:
        log.warning("%s; training goes on", problem)
    return not problem


def link(name: Path, target: Path) -> None:
    """Atomically make ``name`` a relative symbolic link to ``target`` in the same folder.

    It is a hard link or a copy on a file system without symbolic links.

    Raises:
        FileError: none of them can be made. The message gives the first reason, and that of the copy if it is another.
    """
    if name.name == target.name:
        return  # the file itself has that name, as after a copy
    check_owner(name)
    part = name.with_name(f".{name.name}.{uuid.uuid4().hex}.partial")
    failures: list[OSError] = []
    try:
        for make in (_link_symbolically, os.link, _copy):
            try:
                make(target, part)
            except OSError as error:
                failures.append(error)
                part.unlink(missing_ok=True)  # the half of a copy
            else:
                move(part, name)
                return
        reasons = [error.strerror or str(error) for error in failures]
        copying = f" (copying: {reasons[-1]})" if reasons[-1] != reasons[0] else ""
        message = f"cannot link {name} to {target.name}: {reasons[0]}{copying}"
        raise writing_error(f"{message}; free space there, or choose another folder", failures[0])
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _link_symbolically(target: Path, name: Path) -> None:
    name.symlink_to(target.name)


def _copy(target: Path, name: Path) -> None:
    """Copy a file durably."""
    with target.open("rb") as source, name.open("wb") as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        os.fsync(copy.fileno())
