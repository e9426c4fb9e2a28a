"""Signals that end a run: the first one asks for a checkpoint, and a second one ends the process at once."""

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
# torchrun, shells and schedulers may pass on a signal that the process has had already. It does not count twice.
SECOND_AFTER_S = 1.0


def set_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():  # Python lets no other thread set them
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignored(number: signal.Signals) -> bool:
    """Whether the signal is ignored, as ``nohup`` wants it for SIGHUP."""
    return signal.getsignal(number) == signal.SIG_IGN


@contextlib.contextmanager
def end_at_first_signal(end: Callable[[int], object]) -> Iterator[None]:
    """During the block, SIGTERM and SIGHUP end a run that has not begun. SIGINT raises KeyboardInterrupt anyway.

    Args:
        end: raises an exception for an exit code, so that what the run has made so far can be removed.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM) if not ignored(number)}

    def leave(number: int, frame: FrameType | None) -> None:
        set_handlers(dict.fromkeys(before, signal.SIG_IGN))  # another one must not disturb the cleaning up
        _say(f"{signal.Signals(number).name}: ended before the first step")
        end(128 + number)

    set_handlers(dict.fromkeys(before, leave))
    try:
        yield
    finally:
        set_handlers(before)


@contextlib.contextmanager
def end_at_second_signal(first_answer: str, end: Callable[[int], object]) -> Iterator[None]:
    """During the block, answer the first of the signals ``ENDING`` by a line, and end the process at a second one.

    The signals must have Python handlers. A thread reads their numbers from a pipe that Python's own handler fills. So
    it also acts where the main thread is stuck in a collective, and would run no handler.

    Args:
        first_answer: what rank 0 prints after the name of the first signal.
        end: ends the process with an exit code, from any thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _pipes.add(writer)
    threading.Thread(target=_answer, args=(reader, first_answer, end), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        _pipes.discard(writer)
        os.close(writer)  # ends the thread


def _answer(reader: int, first_answer: str, end: Callable[[int], object]) -> None:
    first: float | None = None
    with open(reader, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] not in ENDING:
                continue
            name = signal.Signals(number[0]).name
            if number[0] == signal.SIGHUP:
                _forget_lost_terminal()
            if first is None:
                first = time.monotonic()
                _say(f"{name}: {first_answer}")
            elif time.monotonic() - first >= SECOND_AFTER_S:
                _say(f"{name}: a second signal, ended at once")
                end(128 + number[0])  # no default handler: process 1 of a container would survive it


def _say(line: str) -> None:
    if not getattr(rank_zero_only, "rank", 0):
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())  # unbuffered: the main thread may hold the lock of sys.stderr


def _forget_lost_terminal() -> None:
    """Let what is printed to a terminal that is gone vanish, instead of failing the run before it has saved."""
    for stream in (1, 2):
        try:
            os.ttyname(stream)
        except OSError as error:
            if error.errno == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


_pipes: set[int] = set()


def _leave_to_parent() -> None:
    """A data worker must not report the signals that it gets as if its parent had got them."""
    if _pipes:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_to_parent)
