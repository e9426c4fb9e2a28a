"""Where results go: folders that appear whole or not at all, files that can be written, a bar beneath the work."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from fmlit.metrics.ranks import Ranks

T = TypeVar("T")


def progress(batches: Iterable[T], total: int, what: str, shown: bool = True) -> Iterator[T]:
    """The batches, with a bar beneath them if this is a terminal."""
    shown = shown and sys.stderr.isatty()
    yield from track(batches, what, total, console=Console(stderr=True), transient=True, disable=not shown)


@contextmanager
def new_folder(path: Path, ranks: Ranks = Ranks()) -> Iterator[Path]:
    """A folder to fill, by all ranks; it appears under its name when the block ends, and not at all if that fails.

    Raises:
        ValueError: there is something of that name already, other than an empty folder.
        OSError: it cannot be written.
    """
    whole = path.resolve()  # "." has no name
    partial = whole.with_name(f".{whole.name}.partial") if whole.name else whole

    def begin() -> None:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ValueError(f"{path} exists already: remove it, or choose another name")
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process
        partial.mkdir(parents=True)

    def end() -> None:
        partial.replace(whole)

    ranks.from_first(begin)
    try:
        with ranks.failing_together():
            yield partial
        ranks.from_first(end)
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def new_file(path: str, *endings: str) -> Path:
    """A path that can be written, looked at before the work rather than after it; its folder is made.

    Raises:
        ValueError: it does not end in one of ``endings``.
        OSError: its folder cannot be made or written.
    """
    file = Path(path)
    if file.suffix.lower() not in endings:
        raise ValueError(f"{path} must end in {' or '.join(endings)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK) or file.is_dir():
        raise OSError(f"cannot write {path}: {'it is a folder' if file.is_dir() else 'its folder is read-only'}")
    return file
