"""Data loading alone: fmlit's loader, images that lie on the device, and the loaders of other packages' examples."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.contenders import BARE, FMLIT, PEERS
from benchmarks.loops import BareLoop
from benchmarks.outcome import Outcome, Report
from benchmarks.published import fresh_batches
from benchmarks.rounds import now, rates, run_rounds
from benchmarks.training import built
from benchmarks.workload import Setup, Workload
from fmlit.cli.train import TrainingCLI


def loading(setup: Setup, peers: Sequence[str], lead: int, steps: int, rounds: int, report: Report) -> Outcome:
    """Images/s that arrive on the device, in batches as training takes them. The bare loop's lie there already."""
    device = torch.device(setup.device)
    with built(setup, steps=1) as cli:
        work = Workload.of(cli, device)
        sources: dict[str, Callable[[], Iterator[Any]]] = {
            FMLIT: partial(_ours, cli, device),
            BARE: partial(_resident, BareLoop(work)),
        }
        for peer in peers:
            sources[f"{peer}_published"] = partial(_published, PEERS[peer].loader(work), device)
        blocks = {name: partial(_block, source, lead, steps, device) for name, source in sources.items()}
        done = run_rounds(blocks, rounds, report.round)
    results = rates(done, dict.fromkeys(blocks, steps * work.batch_size), BARE)
    details = {"shape": list(work.images.shape[1:]), "batch_size": work.batch_size, "lead": lead, "steps": steps}
    return Outcome(results, done, details)


def _block(source: Callable[[], Iterator[Any]], lead: int, steps: int, device: torch.device) -> float:
    """Seconds for ``steps`` batches after ``lead`` others; workers end with the block."""
    batches = source()
    for _ in range(lead):
        next(batches)
    started = now(device)
    for _ in range(steps):
        next(batches)
    return now(device) - started


def _ours(cli: TrainingCLI, device: torch.device) -> Iterator[Any]:
    data = cli.datamodule
    for batch in data.train_dataloader():
        yield data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)


def _resident(loop: BareLoop) -> Iterator[Any]:
    while True:
        yield loop.batch()


def _published(loader: Any, device: torch.device) -> Iterator[Any]:
    for images, labels in fresh_batches(loader):
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
