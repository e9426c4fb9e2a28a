"""Two launches of one run: one that was stopped and wakes changes nothing of the new owner's, and names it."""

import hashlib
import signal
from pathlib import Path

import pytest

from tests.faults.jobs import Job

pytestmark = pytest.mark.faults
OPTIONS = ("--lease_expiry=5", "--images=1200")


def contents(run: Path) -> dict[str, str]:
    """The hash of every file of a run."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "lease.1"]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rival(job: Job, *options: str) -> Job:
    """The same command once more, with a place of its own for what it says."""
    folder = job.folder / "rival"
    folder.mkdir()
    return Job(folder, *OPTIONS, "--runs", str(job.folder / "runs"), *options)


@pytest.mark.parametrize("images", [60, 240, 600])
def test_a_woken_loser_changes_nothing_and_names_the_new_owner(images, tmp_path):
    sleeper = Job(tmp_path, *OPTIONS)
    sleeper.wait_until(lambda job: any(seen >= images for seen in job.checkpoints))
    sleeper.signal(signal.SIGSTOP)
    owner = rival(sleeper)
    (outcome,) = owner.outcomes(timeout_s=200)
    assert outcome.code == 0, outcome
    before = contents(sleeper.run)
    sleeper.signal(signal.SIGCONT)
    (outcome,) = sleeper.outcomes()
    assert outcome.code == 76, outcome
    assert f"error: {sleeper.run} now belongs to process {owner.processes[0].pid} on " in outcome.err
    assert contents(sleeper.run) == before
    assert sleeper.last()["images_seen"] == 1200


def test_a_loser_that_wakes_while_the_owner_trains_disturbs_nothing(tmp_path):
    sleeper = Job(tmp_path, *OPTIONS)
    sleeper.wait_until(lambda job: job.checkpoints)
    sleeper.signal(signal.SIGSTOP)
    owner = rival(sleeper, "--images=2400")
    owner.wait_until(lambda job: (sleeper.run / "lease.2").exists() and max(sleeper.checkpoints, default=0) >= 900)
    sleeper.signal(signal.SIGCONT)
    assert sleeper.outcomes()[0].code == 76
    (outcome,) = owner.outcomes(timeout_s=200)
    assert outcome.code == 0, outcome
    assert sleeper.rows == 1 + 2400 // 12
    assert sleeper.checkpoints == [2340, 2400]


def test_a_run_in_use_is_not_joined(tmp_path):
    first = Job(tmp_path, "--lease_expiry=5", "--images=100000")
    first.wait_until(lambda job: job.checkpoints)
    second = rival(first)
    (outcome,) = second.outcomes()
    first.signal(signal.SIGKILL)
    first.outcomes()
    assert outcome.code == 75, outcome
    assert f"is in use by process {first.processes[0].pid} on " in outcome.err
    assert len(outcome.err.splitlines()) == 1
