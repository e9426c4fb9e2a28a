"""Atomic files and folders, and SHA-256 sums in the format of ``sha256sum``."""

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fmlit.core.errors import FileError, UserError, writing_error
from fmlit.core.processes import ProcessGroup


def expand(path: str | Path, option: str = "") -> Path:
    """A path as the user wrote it, with ``~`` and ``$VAR`` expanded as a shell does it.

    An existing file may have such characters in its name.

    Args:
        path: the path.
        option: names the path in messages.

    Raises:
        UserError: a variable or a user is unknown, or the path is a URL.
    """
    given, named = str(path), f"{option}: " if option else ""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", given):
        raise UserError(f"{named}{given} is a URL: give a local path")
    expanded = os.path.expanduser(os.path.expandvars(given))
    unknown = re.search(r"\$\w+|\$\{\w+\}", expanded) or re.match(r"~[^/]*", expanded)
    if unknown and not os.path.lexists(given):
        raise UserError(f"{named}{unknown[0]} in {given} is unknown; set it, or write the path out")
    return Path(expanded)


@contextmanager
def file_errors(path: str | Path) -> Iterator[None]:
    """Raise a ``FileError`` that names ``path`` where writing to it fails inside the block."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise writing_error(
            f"cannot write {path}: {error.strerror or error}; free space there, make it writable, or choose another",
            error,
        ) from error


_guards: dict[Path, Callable[[], None]] = {}  # by folder


def guard(folder: Path, check: Callable[[], None]) -> None:
    """Call ``check`` before each change of a file in the folder. It raises if this process may not change it."""
    _guards[folder] = check


def unguard(folder: Path) -> None:
    _guards.pop(folder, None)


def check_owner(path: Path) -> None:
    """Raise what the guard of a folder raises, where the file is in one.

    Who appends to a file opens it before this call, and who removes one opens its folder. A process that is stopped
    between the call and the change then changes what it has opened, even if that has been replaced in the meantime.
    """
    if _guards:
        folder = path.parent.resolve()
        for guarded, check in list(_guards.items()):
            if folder.is_relative_to(guarded):
                check()


def remove(path: Path) -> None:
    """Remove a file, if it is there and this process owns its folder."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        check_owner(path)
        with suppress(FileNotFoundError):
            os.unlink(path.name, dir_fd=folder)
    finally:
        os.close(folder)


def move(temporary: Path, path: Path) -> None:
    """Replace ``path`` by a file that has just been written, if this process owns the folder."""
    check_owner(path)
    try:
        os.replace(temporary, path)
    except FileNotFoundError:
        check_owner(path)  # a new owner has removed it
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Atomically replace ``path`` when the block ends. If the block fails, ``path`` stays as it was."""
    check_owner(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # a move is atomic only within a folder
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        move(temporary, path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make moves in a folder durable, where its file system can do that. Many network file systems cannot."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


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
    file = expand(path)
    if file.suffix.lower() not in endings:
        raise UserError(f"{path} must end in {' or '.join(endings)}")
    with file_errors(path):
        file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK) or file.is_dir():
        raise FileError(f"cannot write {path}: {'it is a folder' if file.is_dir() else 'its folder is read-only'}")
    return file
