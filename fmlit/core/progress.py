"""Progress bars."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def progress(batches: Iterable[T], total: int | None, what: str, shown: bool = True) -> Iterator[T]:
    """Yield the batches and show a progress bar, if stderr is a terminal. ``total`` None stands for their ``len``."""
    shown = shown and sys.stderr.isatty()
    yield from track(batches, what, total, console=Console(stderr=True), transient=True, disable=not shown)
