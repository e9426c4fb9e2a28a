"""A real Slurm: the script that we ship, preempted and requeued, ends in the weights of an uninterrupted run."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.faults.jobs import RECIPE, Job, assert_same_training

ROOT = Path(__file__).parents[2]


def slurm(*command: str, **settings) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, **settings).stdout.strip()


def why_not() -> str:
    """Why there is no Slurm to test with; empty where there is one."""
    if not shutil.which("sbatch"):
        return "there is no sbatch on the PATH"
    asked = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
    return "" if "idle" in asked.stdout else f"no node of this Slurm is idle ({asked.stdout or asked.stderr})"


pytestmark = [pytest.mark.faults, pytest.mark.slow]


class SlurmJob:
    """One batch job of two tasks."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.log = folder / "slurm.out"
        self.checkpoints = folder / "runs" / "recipe" / "checkpoints"
        request = ("--ntasks-per-node=2", "--cpus-per-task=1", f"--output={self.log}", "--parsable")
        options = ("--config", str(folder / "recipe.yaml"), "--runs", str(folder / "runs"), *args)
        # One thread for each task, as for the run that it is compared with: two sum in another order.
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        script = "scripts/slurm/train.sbatch"
        self.id = slurm("sbatch", *request, script, *options, cwd=ROOT, env=environment).split(";")[0]

    @property
    def state(self) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        shown = dict(part.split("=", 1) for part in slurm("scontrol", "show", "job", self.id).split() if "=" in part)
        return shown["JobState"]

    @property
    def images_seen(self) -> int:
        return max((int(path.stem) for path in self.checkpoints.glob("[0-9]*.ckpt")), default=0)

    def wait_until(self, condition, timeout_s: float = 300) -> None:
        until = time.monotonic() + timeout_s
        while not condition(self):
            said = self.log.read_text() if self.log.exists() else ""
            assert self.state not in ("FAILED", "CANCELLED", "TIMEOUT"), said
            assert time.monotonic() < until, (self.state, said)
            time.sleep(0.2)

    def start_again(self) -> None:
        """Without the two minutes that Slurm lets a requeued job wait."""
        self.wait_until(lambda job: job.state == "PENDING")
        slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now")
        self.wait_until(lambda job: job.state == "RUNNING")


def test_a_job_that_is_preempted_and_requeued_ends_in_the_weights_of_an_uninterrupted_one(tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    (tmp_path / "whole").mkdir()
    images = ("--images", "4800")
    expected = Job(tmp_path / "whole", *images, ranks=2).finish()

    (tmp_path / "recipe.yaml").write_text(RECIPE)
    job = SlurmJob(tmp_path, *images)
    try:
        job.wait_until(lambda job: job.images_seen >= 300)
        slurm("scancel", "--signal=USR1", job.id)  # as Slurm does before the time limit
        job.start_again()
        assert f"saved {job.checkpoints}" in job.log.read_text()
        assert f"job {job.id} is requeued" in job.log.read_text()
        before = job.images_seen
        job.wait_until(lambda job: job.images_seen >= before + 300)
        slurm("scontrol", "requeue", job.id)  # somebody else's hand, without a warning
        job.start_again()
        job.wait_until(lambda job: job.state == "COMPLETED")
    finally:
        subprocess.run(["scancel", job.id], capture_output=True)
    run = job.checkpoints.parent
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name]
    steps = [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == [str(step) for step in range(1, 401)]
    assert_same_training(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True), expected)
