"""Where results go: folders that appear whole or not at all, files that can be written, a bar beneath the work."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def progress(batches: Iterable[T], total: int, what: str, shown: bool = True) -> Iterator[T]:
    """The batches, with a bar beneath them if this is a terminal."""
    shown = shown and sys.stderr.isatty()
    yield from track(batches, what, total, console=Console(stderr=True), transient=True, disable=not shown)
