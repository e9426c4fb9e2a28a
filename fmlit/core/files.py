"""Atomic files and folders, and SHA-256 sums in the format of ``sha256sum``."""

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fmlit.core.errors import FileError, UserError
from fmlit.core.processes import ProcessGroup


@contextmanager
def file_errors(path: str | Path) -> Iterator[None]:
    """Raise a ``FileError`` that names ``path`` where writing to it fails inside the block."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"cannot write {path}: {error.strerror or error}; free space there, make it writable, or choose another"
        ) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Atomically replace ``path`` when the block ends. If the block fails, ``path`` stays as it was."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # a move is atomic only within a folder
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the move durable
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


class HashingWriter:
    """A file for ``torch.save`` that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.flush = file, hashlib.sha256(), file.flush

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_hashes(path: Path) -> list[tuple[str, str]]:
    """Read the (hash, name) pairs of a file of ``sha256sum``. A file that is missing, or something else, holds none."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return re.findall(r"^([0-9a-f]{64})  (.+)$", text, re.MULTILINE)


def write_hashes(path: Path, hashes: Iterable[tuple[str, str]]) -> None:
    """Atomically write (hash, name) pairs as ``sha256sum`` does."""
    with atomic_write(path) as file:
        file.write("".join(f"{digest}  {name}\n" for digest, name in hashes).encode())


@contextmanager
def new_folder(path: Path, ranks: ProcessGroup = ProcessGroup()) -> Iterator[Path]:
    """A folder that all ranks fill. It appears under its name when the block ends, or not at all if the block fails.

    Raises:
        UserError: the path exists already and is not an empty folder.
        FileError: the folder cannot be written.
    """
    whole = path.resolve()  # "." has no name
    partial = whole.with_name(f".{whole.name}.partial") if whole.name else whole

    def begin() -> None:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path} exists already: remove it, or choose another name")
        shutil.rmtree(partial, ignore_errors=True)  # left behind by a killed process
        with file_errors(path):
            partial.mkdir(parents=True)

    def end() -> None:
        with file_errors(path):
            partial.replace(whole)

    ranks.from_first(begin)
    try:
        with ranks.fail_together():
            yield partial
        ranks.from_first(end)
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def new_file(path: str, *endings: str) -> Path:
    """Check that a path can be written, before the work and not after it. Its folder is created.

    Raises:
        UserError: the path does not end in one of ``endings``.
        FileError: the folder cannot be created or written.
    """
    file = Path(path)
    if file.suffix.lower() not in endings:
        raise UserError(f"{path} must end in {' or '.join(endings)}")
    with file_errors(path):
        file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK) or file.is_dir():
        raise FileError(f"cannot write {path}: {'it is a folder' if file.is_dir() else 'its folder is read-only'}")
    return file
