"""Training speed: fmlit through its Trainer, and other loops, in turn within one fit."""

import contextlib
import importlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.contenders import BARE, FMLIT, PEERS, Builder, find_loops
from benchmarks.outcome import Outcome, Report
from benchmarks.published import PublishedLoop
from benchmarks.rounds import Round, now, rates, run_round, spread
from benchmarks.workload import Setup, Workload, quiet
from fmlit.cli.train import TrainingCLI
from fmlit.core.processes import ProcessGroup
from fmlit.metrics.cost import Meter

STEPS_FOR_MEMORY = 2  # the first makes the optimizer's state, the second holds it and the activations at once


class Blocks(pl.Callback):
    """Times blocks of steps inside one fit, and calls ``between(seconds)`` after each, outside of the time of any.

    The fit then goes on where it stood: starting a Trainer is in no block. The callback is the last one; its clock
    starts after step ``lead`` of a block and stops ``steps`` whole steps later.
    """

    def __init__(self, lead: int, steps: int, between: Callable[[float], None]) -> None:
        self.lead, self.steps, self.between = lead, steps, between
        self._done = 0
        self._started = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._done += 1
        if self._done == self.lead:
            self._started = now(pl_module.device)
        elif self._done == self.lead + self.steps:
            seconds = now(pl_module.device) - self._started
            self._done = 0
            self.between(seconds)


@contextlib.contextmanager
def built(setup: Setup, steps: int) -> Iterator[TrainingCLI]:
    """What train.py builds for so many steps, in a folder that is gone afterwards; nothing is printed meanwhile."""
    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()), quiet():
        yield setup.build(steps, runs)


def fit_in_blocks(cli: TrainingCLI, blocks: Blocks) -> None:
    """Train to the end, with these blocks after all other callbacks."""
    cli.trainer.callbacks.append(blocks)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule)


def race(
    setup: Setup, builders: dict[str, Builder], lead: int, steps: int, rounds: int, report: Callable[[Round], None]
) -> tuple[list[Round], Workload]:
    """fmlit and these loops in turn: a block of fmlit's fit, then one of each loop, then fmlit's fit goes on."""
    done: list[Round] = []
    with built(setup, rounds * (lead + steps)) as cli:
        work = Workload.of(cli, torch.device(setup.device))
        blocks = {name: partial(build(work).block, lead, steps) for name, build in builders.items()}

        def between(seconds: float) -> None:
            done.append(run_round(blocks, **{FMLIT: seconds}))
            report(done[-1])

        fit_in_blocks(cli, Blocks(lead, steps, between))
    return done, work


def peak_memory(setup: Setup, contender: str) -> int:
    """The most bytes that a contender takes, in a process of its own: call it in one.

    On a GPU what PyTorch allocates there. On a CPU the growth of the resident set beyond libraries and data, worker
    processes of loaders not included.
    """
    device = torch.device(setup.device)
    builders, _ = find_loops([peer for peer in PEERS if contender.startswith(peer)])
    if setup.threads:
        torch.set_num_threads(setup.threads)
    with built(setup, STEPS_FOR_MEMORY) as cli:
        work = Workload.of(cli, device)
        for package in [name for peer in PEERS if contender.startswith(peer) for name in PEERS[peer].packages]:
            importlib.import_module(package)
        before = Meter(device).cost(0, ProcessGroup()).memory
        meter = Meter(device)
        if contender == FMLIT:
            if device.type == "cpu":  # where its weights are held already
                before -= sum(weight.nbytes for weight in cli.model.model.net.parameters())
            cli.trainer.fit(cli.model, cli.datamodule)
        else:
            loop = builders[contender](work)
            if isinstance(loop, PublishedLoop):
                loop.load_in_process()
            loop.block(0, STEPS_FOR_MEMORY)
        return meter.cost(0, ProcessGroup()).memory - before


def peak_memories(setup: Setup, contenders: Sequence[str], report: Report) -> dict[str, int | None]:
    """``peak_memory`` of each, one process after the other; None for one that was killed."""
    found: dict[str, int | None] = {}
    for name in contenders:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            try:
                found[name] = process.submit(peak_memory, setup, name).result()
            except BrokenProcessPool:
                found[name] = None
                report(f"the process that measured the memory of {name} was killed: too little memory?")
    return found


def training(
    setup: Setup, peers: Sequence[str], lead: int, steps: int, rounds: int, memory: str, report: Report
) -> Outcome:
    """fmlit, the bare loop and the peers: images/s, the ratio to the bare loop in the same round, peak memory."""
    builders, missing = find_loops(peers)
    for name, reason in missing.items():
        report(f"{name} is left out: {reason}")
    done, work = race(setup, builders, lead, steps, rounds, report.round)
    results: dict[str, dict[str, Any]] = rates(done, dict.fromkeys(done[0].seconds, steps * work.batch_size), BARE)
    flops = work.flops()
    for name, result in results.items():
        result |= spread("ms_per_step", [1e3 * turn.seconds[name] / steps for turn in done])
        over = [1e3 * (turn.seconds[name] - turn.seconds[BARE]) / steps for turn in done]
        result |= spread("ms_over_bare", over)
        result["tflops"] = result["images_per_second"] * flops / 1e12
    if memory == "on":
        for name, size in peak_memories(setup, list(results), report).items():
            results[name]["peak_memory_gb"] = None if size is None else round(size / 1e9, 3)
    details = {
        "parameters": sum(weight.numel() for weight in work.net.parameters()),
        "shape": list(work.images.shape[1:]),
        "batch_size": work.batch_size,
        "precision": "bf16-mixed" if work.mixed else "32-true",
        "compile": work.compile,
        "channels_last": work.channels_last,
        "gflops_per_image": flops / 1e9,
        "lead": lead,
        "steps": steps,
    }
    return Outcome(results, done, details, missing)
