"""Which process this is, whether another of this host has ended, and a clock that no suspension stops."""

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """What tells this process from any other, of this host or another. On Linux only, a death can be proven by it."""
    known: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        known |= {"boot": boot, "pid_namespace": os.readlink("/proc/self/ns/pid"), "started": _start_of(os.getpid())}
    return known


def is_dead(owner: dict[str, Any]) -> bool:
    """Whether the process is of this host and this pid namespace, and has ended for sure. Itself counts as ended."""
    mine = identity()
    place = ("boot", "pid_namespace")
    if not all(owner.get("started") and owner.get(key) == mine.get(key) for key in place):
        return False
    if owner.get("pid") == mine["pid"]:
        return True  # a former run of this process, or of another that has ended and left its number
    try:
        os.kill(owner["pid"], 0)
        started = _start_of(owner["pid"])
    except ProcessLookupError:
        return True
    except (KeyError, OSError, TypeError):  # the process is somebody else's
        return False
    return started != owner.get("started")


def _start_of(pid: int) -> str:
    """The start time of a process in ticks since boot; empty for one that has ended and is not collected yet."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ended = fields[0] in "ZX" and len(os.listdir(f"/proc/{pid}/task")) == 1  # no thread is stuck in a system call
    return "" if ended else fields[19]


def boot_clock() -> float:
    """Seconds since boot, those in suspension included, where the system has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
