"""The lease of a run folder, with clocks that the test moves, and with real processes that race for it."""

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading

import pytest

from fmlit.core.errors import FileError, LeaseLostError, StorageError, TryAgainError, UserError
from fmlit.core.files import atomic_write, check_owner, remove
from fmlit.storage import lease
from fmlit.storage.lease import Lease, Terms, hold
from fmlit.storage.run_folder import RunFolder


class Clock:
    """Seconds that pass when somebody sleeps. ``each`` happens after each sleep."""

    def __init__(self, each=lambda: None):
        self.now, self.each = 1000.0, each

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.each()


@pytest.fixture
def folder(tmp_path):
    yield RunFolder(tmp_path)
    lease.release()


def elsewhere(folder, number=1, count=1, **fields):
    """The lease of a process on another host."""
    owner = {"host": "node7", "pid": 1, "boot": "b", "pid_namespace": "n", "started": "1", "expiry_s": 120.0}
    (folder.path / f"lease.{number}").write_text(json.dumps({**owner, "count": count, "ended": False, **fields}))


def take(folder, terms=Terms(), each=lambda: None):
    clock = Clock(each)
    return hold(folder, terms, clock, clock.sleep), clock.now - 1000


def test_the_first_launch_takes_number_one_and_the_next_two(folder):
    assert hold(folder).number == 1
    lease.release()
    assert json.loads((folder.path / "lease.1").read_text())["ended"] is True
    assert hold(folder).number == 2


def test_a_silent_owner_of_another_host_is_taken_over_after_the_expiry_by_our_clock(folder):
    elsewhere(folder)
    os.utime(folder.path / "lease.1", (4e9, 4e9))  # clocks of other hosts do not count
    held, seconds = take(folder)
    assert held.number == 2
    assert 120 <= seconds < 121


def test_the_owners_expiry_counts_where_it_is_longer(folder):
    elsewhere(folder, expiry_s=300.0)
    assert take(folder, Terms(expiry_s=5))[1] >= 300


def test_an_owner_that_moves_is_alive_and_named(folder):
    counts = iter(range(2, 1000))
    elsewhere(folder)
    with pytest.raises(TryAgainError, match=r"in use by process 1 on node7.*--lease_wait"):
        take(folder, each=lambda: elsewhere(folder, count=next(counts)))
    assert lease.newest(folder.path) == 1


def test_who_waits_takes_over_when_the_owner_ends(folder):
    counts = iter(range(2, 1000))

    def renew():
        count = next(counts)
        elsewhere(folder, count=count, ended=count > 100)

    renew()
    held, seconds = take(folder, Terms(wait_s=600), renew)
    assert held.number == 2
    assert seconds < 100


def test_a_launch_that_comes_back_takes_over_its_own_at_once_and_no_other(folder):
    elsewhere(folder, launch="slurm 7.0")
    assert take(folder, Terms(launch="slurm 7.0", restarted=True))[1] == 0
    lease.release()
    elsewhere(folder, number=3, launch="slurm 7.0")
    assert take(folder, Terms(launch="slurm 8.0", restarted=True))[1] >= 120
    lease.release()
    elsewhere(folder, number=5, launch="slurm 7.0")
    assert take(folder, Terms(launch="slurm 7.0"))[1] >= 120  # the same name, but not started again


def test_a_lease_that_is_empty_or_damaged_expires_as_any_other(folder):
    (folder.path / "lease.1").touch()
    assert take(folder)[1] >= 120
    lease.release()
    (folder.path / "lease.3").write_text('{"count": 3, "ho')
    assert take(folder)[1] >= 120


def _hold_and_die(path):
    hold(RunFolder(path))
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_owner_that_died_on_this_host_is_taken_over_at_once(folder):
    process = multiprocessing.get_context("fork").Process(target=_hold_and_die, args=(folder.path,))
    process.start()
    process.join()
    assert json.loads((folder.path / "lease.1").read_text())["ended"] is False
    held, seconds = take(folder)
    assert (held.number, seconds) == (2, 0)


def test_the_number_of_a_process_alone_proves_nothing(folder):
    mine = lease.identity()
    gone = {**mine, "pid": 2**22 - 1}
    assert lease.is_dead(gone)
    assert lease.is_dead({**mine, "pid": os.getppid(), "started": "1"})  # another process has its number now
    assert not lease.is_dead({**gone, "boot": "another host"})
    assert not lease.is_dead({**gone, "pid_namespace": "another container"})
    assert not lease.is_dead({"host": mine["host"], "pid": gone["pid"]})


def test_a_writer_that_was_stopped_for_half_the_expiry_must_own_the_folder_anew(folder):
    clock = Clock()
    held = Lease(folder.path, 1, Terms(), clock)
    elsewhere(folder)  # creates the file
    held.renew()
    clock.now += 59
    held.check()
    clock.now += 2
    held.check()  # nobody else came
    assert held.number == 2
    clock.now += 61
    elsewhere(folder, number=3)
    with pytest.raises(LeaseLostError, match=r"now belongs to process 1 on node7"):
        held.check()
    held.renew()
    assert json.loads((folder.path / "lease.3").read_text())["host"] == "node7"
    assert lease.newest(folder.path) == 3


def test_a_stale_writer_does_not_renew_what_another_has_taken(folder):
    """The thread may wake before the loop that writes."""
    clock = Clock()
    held = Lease(folder.path, 1, Terms(), clock)
    elsewhere(folder)
    before = (folder.path / "lease.1").read_text()
    elsewhere(folder, number=2)
    clock.now += 61
    held.renew()
    assert (folder.path / "lease.1").read_text() == before
    assert held.lost


def test_nothing_is_written_or_removed_once_another_owns_the_folder(folder):
    folder.checkpoints.mkdir()
    hold(folder)
    file = folder.checkpoint(12)
    with atomic_write(file) as stream:
        stream.write(b"mine")
    elsewhere(folder, number=2)
    with pytest.raises(LeaseLostError), atomic_write(file) as stream:
        stream.write(b"late")
    with pytest.raises(LeaseLostError):
        remove(file)
    assert file.read_bytes() == b"mine"
    check_owner(folder.path.parent / "another")  # other folders are not concerned


def test_what_a_sleeper_still_does_misses_the_new_owners_files(folder):
    """A move, a removal and a row, each stopped after its check and before its system call."""
    folder.checkpoints.mkdir()
    folder.checkpoint(12).write_bytes(b"good")
    folder.last.symlink_to("000000012.ckpt")
    folder.metrics.write_text("step\n1\n")
    elsewhere(folder)
    moved, moved_config = folder.checkpoints / ".a.partial", folder.path / ".config.yaml.a.partial"
    moved.write_bytes(b"late")
    moved_config.write_bytes(b"late")
    opened = os.open(folder.checkpoints, os.O_RDONLY)
    with folder.metrics.open("r+b", buffering=0) as rows:
        take(folder)
        assert folder.last.read_bytes() == b"good"
        with pytest.raises(FileNotFoundError):
            os.replace(moved, folder.checkpoint(12))
        with pytest.raises(FileNotFoundError):
            os.replace(moved_config, folder.config)
        with contextlib.suppress(FileNotFoundError):
            os.unlink("000000012.ckpt", dir_fd=opened)
        os.close(opened)
        rows.truncate(0)
    assert folder.checkpoint(12).read_bytes() == b"good"
    assert folder.metrics.read_text() == "step\n1\n"
    assert sorted(os.listdir(folder.path)) == ["checkpoints", "lease.1", "lease.2", "metrics.csv"]


def test_a_takeover_that_was_cut_short_is_completed(folder):
    folder.checkpoints.mkdir()
    folder.checkpoint(12).write_bytes(b"good")
    folder.checkpoints.rename(folder.path / ".checkpoints.2.old")
    shutil.copytree(folder.path / ".checkpoints.2.old", folder.path / ".checkpoints.2.new")
    hold(folder)
    assert folder.checkpoint(12).read_bytes() == b"good"
    assert not list(folder.path.glob(".checkpoints.*"))


def _race(path, barrier, won):
    barrier.wait()
    try:
        held = hold(RunFolder(path), Terms(expiry_s=1))
    except TryAgainError:
        return
    won.put(held.number)
    barrier.wait(20)


@pytest.mark.parametrize("silent", [False, True], ids=["of a free folder", "of an expired one"])
def test_of_several_takers_one_wins(silent, folder):
    if silent:
        elsewhere(folder, expiry_s=1)
    context = multiprocessing.get_context("fork")
    barrier, won = context.Barrier(5), context.Queue()
    takers = [context.Process(target=_race, args=(folder.path, barrier, won)) for _ in range(5)]
    for taker in takers:
        taker.start()
    assert won.get(timeout=20) == 1 + silent
    losers = [taker for taker in takers if not taker.join(4) and not taker.is_alive()]
    assert len(losers) == 4
    assert won.empty()
    for taker in takers:
        taker.kill()
        taker.join()


def test_of_many_threads_one_creates_a_number(folder):
    created = []
    threads = [threading.Thread(target=lambda: created.append(lease._create(folder.path, 1))) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(created) == [False] * 31 + [True]


@pytest.mark.parametrize(("key", "terms"), [("expiry", {"expiry_s": 0.0}), ("wait", {"wait_s": -1.0})])
def test_terms_that_make_no_sense_are_named(key, terms):
    with pytest.raises(UserError, match=f"lease_{key}"):
        Terms(**terms)


def test_what_a_kill_left_half_written_is_removed_at_the_next_start(folder):
    """Also where its process is known to have ended. A picture that ``sample`` is drawing is not the run's."""
    folder.samples.mkdir()
    folder.checkpoints.mkdir()
    left = [folder.path / ".metrics.csv.a.partial", folder.samples / ".000000012.png.a.partial"]
    left.append(folder.checkpoints / ".last.ckpt.a.partial")
    drawing = folder.samples / ".drawn-001.png.a.partial"
    for path in (*left, drawing):
        path.write_bytes(b"half")
    hold(folder)
    assert not any(path.exists() for path in left)
    assert drawing.exists()


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, StorageError), (errno.EACCES, FileError)])
def test_a_lease_that_cannot_be_written_is_no_bug(tmp_path, monkeypatch, code, kind):
    def fail(folder, number):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lease, "_create", fail)
    with pytest.raises(FileError, match=os.strerror(code)) as raised:
        hold(RunFolder(tmp_path))
    assert type(raised.value) is kind
