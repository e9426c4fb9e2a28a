"""Worker processes that read data. If one is stuck or lost, the run ends in one line instead of waiting forever."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from fmlit.core.errors import TryAgainError
from fmlit.core.internals import worker_processes

T = TypeVar("T")
TIMEOUT_S = 600.0  # as for collectives: a worker that has handed over nothing by then is stuck


class WatchedLoader(DataLoader[T]):
    """A ``DataLoader`` that names what happened to its workers.

    torch waits forever for a worker that is stopped, that waits for its storage, or that cannot hand over its batch.
    Its own ``timeout`` does not cover the last step, in which a worker passes on a file descriptor. So if a batch takes
    longer than ``TIMEOUT_S``, a timer kills the workers, which ends the wait. Errors of the data set pass unchanged.

    Raises:
        TryAgainError: in the iterator, if a worker was killed, ended, or did not answer.
    """

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        return _watch(iterator) if self.num_workers else iterator


def _watch(batches: Iterator[T]) -> Iterator[T]:
    workers = worker_processes(batches)
    while True:
        stuck = threading.Event()
        timer = threading.Timer(TIMEOUT_S, _kill, (workers, stuck))
        timer.daemon = True
        timer.start()
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if stuck.is_set():
                cause = "one is stopped or waits for its storage, or TMPDIR has too long a path"
                problem = f"the data workers have handed over no batch for {TIMEOUT_S:g} s: {cause}"
                raise TryAgainError(problem) from error
            if line := _first_lost(workers) or lost_worker(error):
                raise TryAgainError(line) from error
            raise
        finally:
            timer.cancel()
        yield batch


def _kill(workers: list[Any], stuck: threading.Event) -> None:
    stuck.set()
    for worker in workers:
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGKILL)  # also ends one that is stopped


def _first_lost(workers: list[Any]) -> str:
    """What to say of the first worker that has ended; nothing if all are alive."""
    for worker in workers:
        worker.join(0.2)  # its connection breaks a moment before its exit code is known
        if worker.exitcode is not None:
            return _describe(worker.pid, signal.strsignal(-worker.exitcode) if worker.exitcode < 0 else None)
    return ""


def lost_worker(error: BaseException) -> str:
    """One line if torch says that a worker was killed or ended; otherwise nothing.

    torch raises a plain ``RuntimeError`` from a signal handler, wherever the program is at that moment.
    """
    text = str(error) if isinstance(error, RuntimeError) else ""
    if match := re.search(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([\w ]+)", text):
        return _describe(match[1], match[2].strip())
    match = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) exited unexpectedly", text)
    return _describe(match[1], None) if match else ""


def _describe(pid: object, killed_by: str | None) -> str:
    if killed_by is None:
        return f"data worker {pid} ended unexpectedly"
    shared = "shared memory may be too small: in Docker, use --ipc=host or a larger --shm-size"
    memory = "if memory ran out, use fewer --data.num_workers"
    return f"data worker {pid} was killed ({killed_by}); {shared if killed_by.startswith('Bus') else memory}"
