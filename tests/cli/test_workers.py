"""Data workers that are killed, stopped or end: the run ends in one line, and another try may cure it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fmlit.core.workers import lost_worker
from tests.helpers.processes import processes
from tests.helpers.tiny_cli import recipe

PROGRAM = """
import multiprocessing, os, sys
import fmlit, fmlit.core.workers
from fmlit.cli.main import main

fmlit.core.workers.TIMEOUT_S = 5

class Faulty(fmlit.Digits):
    num_workers = 1

    def load(self, split):
        dataset = super().load(split)
        read, batches = dataset.batch, []

        def batch(indices):
            batches.append(1)
            if multiprocessing.parent_process() and len(batches) == 5:
                FAULT
            return read(indices)

        dataset.batch = batch
        return dataset

if __name__ == "__main__":
    sys.modules["program"] = sys.modules["__main__"]
    main()
"""
ENDS = {
    "os.kill(os.getpid(), 9)": r"was killed \(Killed\); if memory ran out, use fewer --data.num_workers",
    "os.kill(os.getpid(), 7)": r"was killed \(Bus error\); shared memory may be too small: in Docker",
    "os.kill(os.getpid(), 19)": "the data workers have handed over no batch for 5 s",
    "os._exit(3)": "ended unexpectedly",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ENDS)
def test_a_lost_worker_ends_the_run_in_one_line(tmp_path: Path, fault: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.replace("FAULT", fault))
    options = ["--config", recipe(tmp_path), "--runs", tmp_path / "runs", "--name", "a", "--data", "program.Faulty"]
    command = [sys.executable, "program.py", "train", *map(str, options)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert ENDS[fault].replace("\\", "") in done.stderr.splitlines()[-1]
    time.sleep(1)
    assert not processes(tmp_path)


class Ends(torch.utils.data.Dataset[int]):
    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        signal.raise_signal(self.number)
        return index


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_torchs_words_for_a_killed_worker_are_understood(number: int) -> None:
    with pytest.raises(RuntimeError) as error:
        list(torch.utils.data.DataLoader(Ends(number), num_workers=1))
    assert "was killed" in lost_worker(error.value) or "ended unexpectedly" in lost_worker(error.value)


def test_other_errors_are_left_alone() -> None:
    assert not lost_worker(RuntimeError("a worker of mine was killed by signal: Killed"))
    assert not lost_worker(ValueError("DataLoader worker (pid 7) is killed by signal: Killed"))
