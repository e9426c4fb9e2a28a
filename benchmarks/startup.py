"""The start of ``python scripts/train.py``: from the command to its first step, as a process of its own."""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial

from benchmarks.outcome import Outcome, Report
from benchmarks.rounds import Block, run_rounds, spread
from benchmarks.workload import CLONE, OFF, Setup
from fmlit.core.errors import UserError

# What no training program on these libraries can do without.
IMPORTS = "import torch, lightning.pytorch, diffusers"
FIRST_STEP = "step 1/1 "  # as fmlit.training.callbacks.ProgressBar prints it where there is no screen


def startup(setup: Setup, rounds: int, report: Report) -> Outcome:
    """Seconds until train.py has read its command line and built everything, and until its first step is done.

    In turn with a process that only imports the libraries.
    """
    parts: list[float] = []
    blocks: dict[str, Block] = {"imports alone": _imports, "train.py, first step": partial(_first_step, setup, parts)}
    done = run_rounds(blocks, rounds, report.round)
    seconds = {name: [turn.seconds[name] for turn in done] for name in done[0].seconds}
    seconds["train.py, built"] = parts
    results = {name: spread("seconds", values) for name, values in sorted(seconds.items())}
    return Outcome(results, done, {"built_seconds": parts})


def _environment(setup: Setup) -> dict[str, str]:
    return {**os.environ, **({} if setup.threads is None else {"OMP_NUM_THREADS": str(setup.threads)})}


def _imports() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _first_step(setup: Setup, parts: list[float]) -> float:
    """Seconds until the first step; those until everything is built are added to ``parts``."""
    accelerator = setup.device.partition(":")[0]
    options = [f"--config={setup.recipe}", *OFF, "--trainer.max_steps=1", f"--trainer.accelerator={accelerator}"]
    with tempfile.TemporaryDirectory() as runs, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, str(CLONE / "scripts" / "train.py"), *options, f"--runs={runs}"]
        started = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment(setup)
        ) as process:
            assert process.stdout is not None
            seen = {line: time.perf_counter() - started for line in process.stdout}
        errors.seek(0)
        if process.returncode:
            raise UserError(f"train.py ended with {process.returncode}: {errors.read().strip().splitlines()[-1]}")
    built = next(seconds for line, seconds in seen.items() if line.startswith(runs))
    first = next(seconds for line, seconds in seen.items() if line.startswith(FIRST_STEP))
    parts.append(built)
    return first
