"""How a command ends: a mistake of the user takes one line, and every other error keeps its traceback."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from fmlit.core.errors import ENDINGS, INTERRUPTED, TryAgainError, original_message
from fmlit.core.workers import lost_worker

RANK_0_FIRST_S = 5.0


def debugging() -> bool:
    """Whether ``FMLIT_DEBUG=1`` asks for tracebacks."""
    return os.environ.get("FMLIT_DEBUG", "0") not in ("", "0")


@contextlib.contextmanager
def one_line_errors(memory: str = "try a smaller --batch_size") -> Iterator[None]:
    """End the program with one line on stderr where the user can fix what went wrong.

    A ``UserError``, a missing file and too little memory end with exit code 2, a lost process with 1, a lost lease with
    76, what another try may cure, such as a full disk, with 75, and Ctrl-C with 130. Any other error passes and keeps
    its traceback. ``FMLIT_DEBUG=1`` shows every traceback.

    Args:
        memory: the way out where there is too little memory.
    """
    parent = os.getppid()  # now: rank 0 may be gone before this process fails
    try:
        yield
    except KeyboardInterrupt:
        if debugging():
            raise
        if not process_rank():
            print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        shortage, lost = _memory_shortage(error), lost_worker(error)
        if lost:
            error = TryAgainError(lost)
        if debugging() or not (shortage or isinstance(error, tuple(ENDINGS))):
            raise
        message = f"{shortage}: {memory}" if shortage else original_message(str(error), type(error))
        code = next((code for kind, code in ENDINGS.items() if isinstance(error, kind)), 2)
        exit_with(message or type(error).__name__, code, parent)


def exit_with(message: str, code: int = 2, parent: int | None = None) -> NoReturn:
    """Print the message on one line and exit.

    Of several processes, rank 0 speaks for all. The others give it time to fail as well, which ends them or orphans
    them. If rank 0 continues, the mistake is theirs alone and they print it.

    Args:
        message: what went wrong.
        code: the exit code.
        parent: the process that started this one, which is rank 0 if Lightning did. Default: the current parent.
    """
    rank, parent = process_rank(), parent or os.getppid()
    if rank and os.getppid() == parent:
        time.sleep(RANK_0_FIRST_S)
    if os.getppid() == parent:
        line = "; ".join(part for text in message.splitlines() if (part := text.strip()))
        print(f"error: {f'rank {rank}: ' if rank else ''}{line}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def process_rank() -> int:
    return getattr(rank_zero_only, "rank", 0)


def _memory_shortage(error: Exception) -> str:
    """What was asked for where memory ran out, or nothing."""
    text = str(error)
    said = re.search(r"CUDA out of memory\. Tried|DefaultCPUAllocator: can't allocate", text)
    if not (isinstance(error, torch.OutOfMemoryError) or said):
        return ""
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    return f"out of memory{f', {asked[1]} were asked for' if asked else ''}"
