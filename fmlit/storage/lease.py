"""The lease of a run folder: at most one launch writes there, also across hosts that share a file system.

Each launch that owns the folder creates one more file ``lease.N`` by an exclusive operation. Whoever has created the
highest number is the owner. A thread of the owner renews a counter in its file. Another launch takes over once the
owner has said that it ended, is dead on this very host, or has not moved its counter for the expiry time by the
observer's own clock. Clocks of hosts and times of files are never compared.

``core.files`` calls ``Lease.check`` before each change in the folder. docs/cluster.md says what this promises.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmlit.core.errors import LeaseLostError, TryAgainError, UserError
from fmlit.core.files import atomic_write, file_errors, guard, unguard
from fmlit.core.host import boot_clock, identity, is_dead
from fmlit.storage.run_folder import RunFolder

log = logging.getLogger(__name__)

EXPIRY_S = 120.0  # more than twice the 60 s that NFS may cache attributes
RENEWALS = 12  # in one expiry time
_held: dict[Path, "Lease"] = {}  # by this process


@dataclass(frozen=True)
class Terms:
    """How a launch takes a lease.

    Attributes:
        expiry_s: seconds without a renewal after which an owner counts as lost. The owner's own value counts as well.
        wait_s: seconds to wait for the end of an owner that is alive. 0 refuses as soon as it is known to be alive.
        launch: the name of a launch that may come back, such as a Slurm job.
        restarted: whether it has come back; then it takes over from itself at once.
    """

    expiry_s: float = EXPIRY_S
    wait_s: float = 0.0
    launch: str | None = None
    restarted: bool = False

    def __post_init__(self) -> None:
        if not self.expiry_s > 0:
            raise UserError(f"lease_expiry must be a positive number of seconds, got {self.expiry_s}")
        if not self.wait_s >= 0:
            raise UserError(f"lease_wait must be a number of seconds, 0 or more, got {self.wait_s}")


class Lease:
    """A lease that this process holds.

    Args:
        folder: the run folder.
        number: of its file, which was just created.
        terms: how it is renewed.
        clock: seconds since boot, with the time that the machine was suspended.
    """

    def __init__(self, folder: Path, number: int, terms: Terms, clock: Callable[[], float] | None = None) -> None:
        self.folder, self.number, self.terms = folder, number, terms
        self.clock = clock or boot_clock
        self.lost, self._process = False, os.getpid()
        self._count = 0
        self._renewed_at = self.clock()
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def start(self) -> None:
        """Write the file, renew it in a thread, and guard the folder."""
        self.renew()
        guard(self.folder, self.check)
        self._thread.start()

    def check(self) -> None:
        """Make sure that this launch still owns the folder. Everything that changes the folder calls this first.

        Raises:
            LeaseLostError: it does not. The message names the owner.
        """
        with self._lock:
            if self.lost or _file(self.folder, self.number + 1).exists() or (self._is_stale() and not self._succeed()):
                self.lost = True
                owner = _describe(_read(self.folder, newest(self.folder)))
                raise LeaseLostError(f"{self.folder} now belongs to {owner}; this launch stops and changes nothing")

    def renew(self) -> None:
        """Move the counter, unless the lease is stale or lost."""
        with self._lock:
            if self.lost or (self._is_stale() and not self._succeed()):
                self.lost = True
                return
            before = self.clock()  # a stop during the write must count
            self._count += 1
            self._write(ended=False)
            self._renewed_at = before

    def release(self) -> None:
        """Stop renewing, and say in the file that this launch has ended."""
        if os.getpid() != self._process:  # a fork
            return
        self._stop.set()
        unguard(self.folder)
        with self._lock, contextlib.suppress(OSError):
            self._write(ended=True)

    def _is_stale(self) -> bool:
        return self.clock() - self._renewed_at > self.terms.expiry_s / 2

    def _succeed(self) -> bool:
        """After a pause, own the folder again under the next number, if nobody else has taken it."""
        if not _create(self.folder, self.number + 1):
            return False
        log.warning("%s: this launch was stopped for a while, and goes on", self.folder)
        self.number += 1
        self._renewed_at = self.clock()
        self._write(ended=False)
        return True

    def _write(self, ended: bool) -> None:
        """Write in place: the file is this launch's own. An observer who reads half of it sees that it moves."""
        state = {"count": self._count, "ended": ended, "expiry_s": self.terms.expiry_s, "launch": self.terms.launch}
        text = json.dumps({**identity(), **state})
        with open(_file(self.folder, self.number), "r+b", buffering=0) as file:
            file.write(f"{text:<500}\n".encode())
            os.fsync(file.fileno())

    def _keep(self) -> None:
        while not self._stop.wait(self.terms.expiry_s / RENEWALS) and not self.lost:
            with contextlib.suppress(OSError):  # a disk that stays away makes the lease stale
                self.renew()


def hold(
    folder: RunFolder,
    terms: Terms = Terms(),
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Any] = time.sleep,
) -> Lease:
    """Take the lease of a run folder for this process, and keep it until ``release``.

    Raises:
        TryAgainError: another launch is alive and works in the folder, or the disk is full or failing.
        FileError: the folder cannot be written.
    """
    path = folder.path.resolve()
    if path in _held:
        _held.pop(path).release()
    with file_errors(path):
        number, dead = _wait_for_turn(path, terms, clock, sleep)
        if not dead:
            _fence(folder, number)
        _clean_up(folder)
        lease = _held[path] = Lease(path, number, terms)
        lease.start()
    return lease


def release() -> None:
    """Release all leases of this process."""
    while _held:
        _held.popitem()[1].release()


def abandon(folder: RunFolder) -> None:
    """Remove the folder of a run that has not begun, unless it holds a checkpoint or another launch has taken it."""
    held = _held.get(folder.path.resolve())
    with contextlib.suppress(LeaseLostError, OSError):
        if held is not None:
            held.check()
        if not folder.has_checkpoints() and (held is not None or not newest(folder.path)):
            shutil.rmtree(folder, ignore_errors=True)


def _wait_for_turn(
    path: Path, terms: Terms, clock: Callable[[], float], sleep: Callable[[float], Any]
) -> tuple[int, bool]:
    """Create the next lease once the owner is gone. Returns its number, and whether the owner surely writes no more."""
    started = clock()
    first = seen = None  # number and content of the newest lease
    still_since = started
    while True:
        number = newest(path)
        content = _read(path, number)
        if (number, content) != seen:
            first, seen, still_since = first or (number, content), (number, content), clock()
            if first == seen and number:
                log.info("%s: lease of %s", path, _describe(content))
        owner = _parse(content)
        gone = not number or owner.get("ended") is True or is_dead(owner)
        expired = clock() - still_since >= max(terms.expiry_s, float(owner.get("expiry_s") or 0))
        own = terms.restarted and owner.get("launch") == terms.launch
        if gone or expired or own:
            if _create(path, number + 1):
                return number + 1, gone
        elif seen != first and clock() - started >= terms.wait_s:
            later = "wait for it with --lease_wait SECONDS, or start a run of another name"
            raise TryAgainError(f"{path} is in use by {_describe(content)}; {later}")
        else:
            sleep(min(0.5, terms.expiry_s / RENEWALS))


def newest(folder: Path) -> int:
    """The number of the newest lease; 0 if there is none."""
    numbers = (re.fullmatch(r"lease\.(\d+)", name) for name in os.listdir(folder))
    return max((int(match[1]) for match in numbers if match), default=0)


def _fence(folder: RunFolder, number: int) -> None:
    """Put what a launch that was only stopped may still change out of its reach.

    Its one pending system call was checked before this lease existed. If it is a move, its source is gone. If it
    appends to metrics.csv, or removes a checkpoint, it does that in a file or folder that no longer has its name.
    """
    for partial in [*folder.path.glob(".*.partial"), *folder.samples.glob(".*.partial")]:
        partial.unlink(missing_ok=True)
    if folder.metrics.exists():
        with atomic_write(folder.metrics) as file:
            file.write(folder.metrics.read_bytes())
    if not folder.checkpoints.is_dir():
        return
    fresh = folder.path / f".checkpoints.{number}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for path in folder.checkpoints.iterdir():
        if not path.name.endswith(".partial"):
            try:
                os.link(path, fresh / path.name, follow_symlinks=False)
            except OSError:
                shutil.copy2(path, fresh / path.name, follow_symlinks=False)
    folder.checkpoints.rename(folder.path / f".checkpoints.{number}.old")
    fresh.rename(folder.checkpoints)


def _clean_up(folder: RunFolder) -> None:
    """Complete a takeover that was cut short, and remove what earlier launches left: folders, half-written files."""
    kept = sorted(folder.path.glob(".checkpoints.*.old"), key=lambda path: int(path.name.split(".")[2]))
    if kept and not folder.checkpoints.exists():
        kept.pop().rename(folder.checkpoints)
    for path in [*kept, *folder.path.glob(".checkpoints.*.new")]:
        shutil.rmtree(path, ignore_errors=True)
    for part in (folder.path, folder.samples, folder.checkpoints):
        for partial in part.glob(".*.partial"):
            if not partial.name.startswith(".drawn-"):  # `sample` may be drawing it now
                with contextlib.suppress(OSError):
                    partial.unlink()


def _file(folder: Path, number: int) -> Path:
    return folder / f"lease.{number}"


def _create(folder: Path, number: int) -> bool:
    """The one step that decides between two launches."""
    try:
        os.close(os.open(_file(folder, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    return True


def _read(folder: Path, number: int) -> str:
    try:
        return _file(folder, number).read_text(errors="replace")
    except OSError:
        return ""


def _parse(content: str) -> dict[str, Any]:
    """The fields of a lease; none if it is empty, half-written or damaged."""
    with contextlib.suppress(ValueError):
        if isinstance(fields := json.loads(content), dict):
            return fields
    return {}


def _describe(content: str) -> str:
    owner = _parse(content)
    launch = f" ({owner['launch']})" if owner.get("launch") else ""
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}{launch}"
