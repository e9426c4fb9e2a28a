"""Checkpoint files that survive a kill at any point, are verified before use, and cannot run code.

A checkpoint ``000064000.ckpt`` has its SHA-256 beside it in ``000064000.ckpt.sha256``, as ``sha256sum`` writes it. A
folder of checkpoints has one writer, rank 0 of its run.
"""

import logging
import os
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from fmlit.core.errors import UserError, first_line, writing_error
from fmlit.core.files import HashingWriter, atomic_write, check_owner, read_hashes, remove, sha256, write_hashes
from fmlit.storage.descriptions import check_depth
from fmlit.storage.run_folder import LAST

log = logging.getLogger(__name__)

StrPath = str | Path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically and durably, with their hash; loads only what verifies, with ``weights_only``.

    A file is written beside its destination and moved over it once it is on the disk. Before the move, the sidecar
    gets the new hash beside the old one: whichever of the two files a kill leaves behind, it verifies.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: StrPath, storage_options: Any = None) -> None:
        """Write a checkpoint; an older one of that name stays until the new one is complete.

        Raises:
            FileError: the folder cannot be written, or the disk is full. The message names folder and file.
            UserError: the checkpoint holds objects that could not be loaded again with ``weights_only``.
        """
        if storage_options is not None:
            raise TypeError("storage_options are for remote storage; AtomicCheckpointIO writes local files")
        path = _local(path)
        check_owner(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path.parent)
            previous = _recorded(path) or ([sha256(path)] if path.is_file() else [])
            with atomic_write(path) as file:
                digest = _save(checkpoint, file)
                _record(path, [*previous, digest])
            if previous:
                _record(path, [digest])
        except OSError as error:
            raise writing_error(
                f"cannot write checkpoint {path.name} in {path.parent}: {error.strerror or error}; earlier checkpoints "
                f"are untouched; free space there, make the folder writable, or choose another",
                error,
            ) from error

    def load_checkpoint(
        self, path: StrPath, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """A verified checkpoint. Raises FileNotFoundError, or a UserError that names the file and what is wrong."""
        if weights_only is False:
            raise UserError(f"checkpoint {path}: weights_only=False could run code from the file; leave it out")
        return load(path, map_location, mmap=False)

    def remove_checkpoint(self, path: StrPath) -> None:
        """Remove a checkpoint and its sidecar."""
        remove(_local(path))
        remove(_sidecar(_local(path)))


def find_damage(path: StrPath) -> str:
    """What makes a checkpoint file differ from the one that was written. Empty for an intact file.

    The file is compared with its recorded SHA-256 or, where none is recorded, with its archive's own checksums.
    """
    path = Path(path)
    if not path.is_file():
        return "it is a link to a file that is gone" if path.is_symlink() else "there is no such file"
    sidecar = _sidecar(path.resolve())
    if sidecar.exists():
        recorded = _recorded(path)
        if not recorded:
            return f"{sidecar.name} holds no SHA-256; delete that file if you trust the checkpoint"
        return "" if sha256(path) in recorded else f"its SHA-256 is not the one recorded in {sidecar.name}"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged archive makes the reader fail in any way
        return f"it is truncated or not a checkpoint ({error})"
    return f"its record {damaged} is damaged" if damaged else ""


def newest_valid(folder: StrPath) -> Path:
    """The checkpoint in a folder that has seen most images, of those that verify; ``last.ckpt`` among equals.

    One warning for each file that is skipped.

    Raises:
        UserError: there is none.
    """
    found, skipped = [], 0
    for path in sorted(Path(folder).glob("*.ckpt")):
        try:
            checkpoint = _read(path)  # the tensors stay on the disk
            progress = [int(checkpoint.get(key) or 0) for key in ("images_seen", "global_step")]
            found.append((progress, path.name == LAST, path))
        except (OSError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # it may hold anything
            skipped += 1
            log.warning("skipped a checkpoint: %s", error)
    for _, _, path in sorted(found, reverse=True):
        damage = find_damage(path)
        if not damage:
            return path
        skipped += 1
        log.warning("skipped a checkpoint: %s is damaged: %s", path, damage)
    raise UserError(f"no usable checkpoint in {folder} ({skipped} damaged); start anew, without --resume")


def load(path: StrPath, map_location: Any = "cpu", mmap: bool = True) -> dict[str, Any]:
    """A verified checkpoint: plain data and tensors. With ``mmap``, a tensor is read from the file when it is used.

    Raises FileNotFoundError, or a UserError that names the file and what is wrong with it.
    """
    path = _local(path)
    damage = find_damage(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} cannot be loaded: {damage}")
    if damage:
        raise UserError(f"checkpoint {path} is damaged: {damage}; take another one from {path.parent}")
    return _read(path, map_location, mmap)


def _save(checkpoint: dict[str, Any], file: IO[bytes]) -> str:
    """Write the checkpoint; returns the SHA-256 of what was handed to the disk, not of what arrived there."""
    writer = HashingWriter(file)
    try:
        torch.save(checkpoint, cast(IO[bytes], writer))
    except RuntimeError as error:  # a failed write reaches us as an inconsistency of torch's archive
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    if foreign := _foreign_objects(Path(file.name)):  # fail now, not at the resume that needs the file
        raise UserError(
            f"the checkpoint would hold {foreign}, which could not be loaded again: only tensors and plain values are; "
            f"convert it in state_dict, on_save_checkpoint or save_hyperparameters"
        )
    return writer.sha256.hexdigest()


def _read(path: Path, map_location: Any = "cpu", mmap: bool = True) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # a damaged or forged file makes the reader fail in any way
        if foreign := _foreign_objects(path):
            problem = f"is refused: it holds {foreign}, which could run code; only tensors and plain values are loaded"
        else:
            reason = first_line(error)
            if "weights_only" in str(error):  # torch then proposes to run whatever the file holds
                reason = "it holds something other than tensors and plain values"
            problem = f"cannot be read: {reason}"
        raise UserError(f"checkpoint {path} {problem}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"checkpoint {path} holds a {type(checkpoint).__qualname__}, not a checkpoint")
    try:
        check_depth(checkpoint)
    except UserError as error:
        raise UserError(f"checkpoint {path} is refused: {error}") from error
    return checkpoint


def _foreign_objects(path: Path) -> str:
    """What ``weights_only`` refuses in a file, found without loading it; empty if there is none."""
    try:
        return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # as above; whoever asks goes on to load the file, and reports why that fails
        return ""


def _local(path: StrPath) -> Path:
    if "://" in str(path):
        raise UserError(f"checkpoint {path} is a URL: download it, or mount the storage, and give a path")
    return Path(path)


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _recorded(path: Path) -> list[str]:
    """The hashes in the sidecar of the file, or of the file that it links to; none if there is no sidecar."""
    return [digest for digest, _ in read_hashes(_sidecar(path.resolve()))]


def _record(path: Path, digests: list[str]) -> None:
    write_hashes(_sidecar(path), [(digest, path.name) for digest in digests])


def _remove_leftovers(folder: Path) -> None:
    """Clean up after a killed save."""
    for path in folder.glob(".*.partial"):
        remove(path)
    for path in folder.glob("*.ckpt.sha256"):
        if not os.path.lexists(path.with_suffix("")):
            remove(path)
