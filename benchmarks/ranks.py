"""Two processes against one at the same global batch: throughput, and the time that their exchange takes."""

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from benchmarks.outcome import Outcome, Report
from benchmarks.rounds import rates, run_rounds, spread
from benchmarks.training import Blocks, built, fit_in_blocks
from benchmarks.workload import Setup, quiet
from fmlit.core.errors import UserError

RANKS = 2
ONE, TWO, SILENT = "one process", "two processes", "two processes, silent"
PATIENCE = 1.0  # seconds between looks at whether a process has ended


@dataclass
class Exchange:
    """How gradients are averaged: not at all where silent; else ``spans`` notes from when to when, for each bucket."""

    silent: bool = False
    spans: list[tuple[float, float]] = field(default_factory=list)


def average(exchange: Exchange, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A DDP communication hook. Silent, it hands gradients back as they are, and the ranks drift apart."""
    if exchange.silent:
        unchanged: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        unchanged.set_result(bucket.buffer())
        return unchanged
    started = time.perf_counter()
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)

    def finished(reduced: torch.futures.Future) -> torch.Tensor:
        exchange.spans.append((started, time.perf_counter()))
        return reduced.value()[0]

    return work.get_future().then(finished)


def union(spans: list[tuple[float, float]]) -> float:
    """Seconds that at least one of these spans covers."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


class Hooked(pl.Callback):
    """Puts the exchange into the DDP module, before its first step."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(self.exchange, average)  # type: ignore[union-attr, operator]


def ranks(setup: Setup, lead: int, steps: int, rounds: int, report: Report) -> Outcome:
    """One process with two threads, two with one thread each, and these two without exchange, in turn.

    ``share_communicating`` is the part of the time during which gradients are on their way, by a communication hook;
    most of it may pass behind the backward pass. ``share_waiting`` is what is lost: the part of the time by which steps
    without exchange are faster.

    Raises:
        ValueError: there are fewer than two GPUs.
    """
    device = torch.device(setup.device)
    if device.type == "cuda" and torch.cuda.device_count() < RANKS:
        raise UserError(f"ranks: two processes need two GPUs, and there are {torch.cuda.device_count()}; --device cpu")
    with built(setup, steps=1) as cli:
        cli.datamodule.prepare_data()
        batch = cli.datamodule.batch_size
    with _groups(setup, lead, steps, rounds) as (alone, together):
        shares: list[float] = []

        def communicating() -> float:
            seconds, exchanging = together.block("exchange")
            shares.append(exchanging / seconds)
            return seconds

        blocks = {
            ONE: lambda: alone.block("exchange")[0],
            TWO: communicating,
            SILENT: lambda: together.block("silent")[0],
        }
        done = run_rounds(blocks, rounds, report.round)
    results: dict[str, dict[str, Any]] = rates(done, dict.fromkeys(blocks, steps * batch), ONE)
    lost = [1 - turn.seconds[SILENT] / turn.seconds[TWO] for turn in done]
    results[TWO] |= spread("share_communicating", shares) | spread("share_waiting", lost)
    details = {
        "batch_size": batch,
        "lead": lead,
        "steps": steps,
        "threads": {ONE: RANKS, TWO: 1} if device.type == "cpu" else None,
        "backend": "gloo" if device.type == "cpu" else "nccl",
        "share_communicating": shares,
    }
    return Outcome(results, done, details)


class Group:
    """Processes that train together, a block at a time when they are told to, and sleep in between."""

    def __init__(self, setup: Setup, size: int, plan: tuple[int, int, int], threads: int, folder: str) -> None:
        context = get_context("spawn")
        self.orders = [context.Queue() for _ in range(size)]
        self.answers = context.Queue()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = [
            context.Process(
                target=_member, args=(setup, rank, size, port, plan, threads, folder, self.orders[rank], self.answers)
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def block(self, order: str) -> tuple[float, float]:
        """Seconds of a block, and seconds of it in which rank 0 was exchanging gradients."""
        for queue in self.orders:
            queue.put(order)
        answers = sorted(self._answer() for _ in self.processes)
        return max(seconds for _, seconds, _ in answers), answers[0][2]

    def _answer(self) -> tuple[int, float, float]:
        while True:
            try:
                return self.answers.get(timeout=PATIENCE)
            except Empty:
                for rank, process in enumerate(self.processes):
                    if process.exitcode:
                        raise UserError(f"ranks: process {rank} ended with {process.exitcode}; it says why") from None

    def close(self, patience: float = 60.0) -> None:
        """Let them end within so many seconds. Not by SIGTERM: a Trainer goes on after it."""
        for process in self.processes:
            process.join(timeout=patience)
            process.kill()


@contextlib.contextmanager
def _groups(setup: Setup, lead: int, steps: int, rounds: int) -> Iterator[tuple[Group, Group]]:
    with tempfile.TemporaryDirectory() as folder:
        alone = Group(setup, 1, (lead, steps, rounds), RANKS, f"{folder}/one")
        together = Group(setup, RANKS, (lead, steps, 2 * rounds), 1, f"{folder}/two")
        patience = 0.0
        try:
            yield alone, together
            patience = 60.0
        finally:
            alone.close(patience)
            together.close(patience)


def _member(
    setup: Setup,
    rank: int,
    size: int,
    port: int,
    plan: tuple[int, int, int],
    threads: int,
    folder: str,
    orders: Any,
    answers: Any,
) -> None:
    """One process: what torchrun would start, and train.py's Trainer, with a wait for an order before each block."""
    torch.set_num_threads(threads)
    if size > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "benchmark"}
        os.environ.update({key: str(value) for key, value in {**places, **meeting}.items()})
    lead, steps, blocks = plan
    exchange, left = Exchange(), blocks

    def between(seconds: float) -> None:
        nonlocal left
        left -= 1
        since = time.perf_counter() - seconds
        answers.put((rank, seconds, union([(max(a, since), b) for a, b in exchange.spans if b > since])))
        exchange.spans.clear()
        if left:
            exchange.silent = orders.get() == "silent"

    with contextlib.redirect_stdout(open(os.devnull, "w")), quiet():
        cli = setup.build(blocks * (lead + steps), Path(folder), devices=size if size > 1 else None)
        if size > 1:
            cli.trainer.callbacks.append(Hooked(exchange))  # type: ignore[attr-defined]
        exchange.silent = orders.get() == "silent"
        fit_in_blocks(cli, Blocks(lead, steps, between))
    if dist.is_initialized():
        dist.destroy_process_group()
