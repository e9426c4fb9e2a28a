"""Lightning's own launcher and torchrun, one of whose processes is killed: the others end, and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.jobs import RECIPE
from tests.helpers.processes import processes

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "lightning": [sys.executable, str(ROOT / "scripts" / "train.py"), "--trainer.devices=2", "--trainer.strategy=ddp"],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        str(ROOT / "scripts" / "train.py"),
    ],
}

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def wait_for(condition, what: str, log: Path) -> None:
    until = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < until, f"{what}\n{log.read_text()}"
        time.sleep(0.1)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_process_ends_the_launch_and_leaves_no_orphan(launcher, victim, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    log = tmp_path / "log"
    options = ["--config", str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / "runs"), "--images=12000000"]
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*LAUNCHERS[launcher], *options]
        launch = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        last = tmp_path / "runs" / "recipe" / "checkpoints" / "last.ckpt"
        wait_for(last.exists, "no checkpoint", log)
        workers = {
            pid: rank for pid, rank in processes(tmp_path).items() if launcher == "lightning" or pid != launch.pid
        }
        assert sorted(workers.values()) == [0, 1]
        os.kill(next(pid for pid, rank in workers.items() if rank == victim), signal.SIGKILL)
        assert launch.wait(timeout=60) != 0, log.read_text()
        wait_for(lambda: not processes(tmp_path), "orphans", log)
    finally:
        for pid in processes(tmp_path):
            os.kill(pid, signal.SIGKILL)
