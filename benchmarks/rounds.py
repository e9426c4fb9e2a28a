"""Contenders in turn, round after round: whatever else the machine does, it hits all of them alike."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

Block = Callable[[], float]  # does its work and returns the seconds that it took, with what goes before left out


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Round:
    """One turn of every contender.

    Attributes:
        load_average: of the machine at its start, over 1, 5 and 15 minutes.
        seconds: of the timed block of each contender, in the order in which they ran.
    """

    load_average: tuple[float, float, float]
    seconds: dict[str, float]

    def record(self) -> dict[str, Any]:
        return asdict(self)


def run_round(blocks: Mapping[str, Block], **first: float) -> Round:
    """A block of each contender in turn, after those that have just run and took ``first`` seconds."""
    load = os.getloadavg()
    return Round(load, {**first, **{name: block() for name, block in blocks.items()}})


def run_rounds(blocks: Mapping[str, Block], rounds: int, report: Callable[[Round], None]) -> list[Round]:
    """All contenders in turn, ``rounds`` times."""

    def turns() -> Iterator[Round]:
        for _ in range(rounds):
            done = run_round(blocks)
            report(done)
            yield done

    return list(turns())


def rates(rounds: list[Round], images: Mapping[str, int], limit: str | None = None) -> dict[str, dict[str, float]]:
    """Images per second of each contender: median, lowest and highest over the rounds.

    Args:
        rounds: what was measured.
        images: that each contender handled in a block.
        limit: the contender to which the others are compared, round by round: ``ratio`` is the median of their images
            per second over its own in the same round.
    """
    results = {}
    for name in rounds[0].seconds:
        of_rounds = [images[name] / done.seconds[name] for done in rounds]
        results[name] = spread("images_per_second", of_rounds)
        if limit is not None:
            of_limit = [images[limit] / done.seconds[limit] for done in rounds]
            results[name] |= spread("ratio", [a / b for a, b in zip(of_rounds, of_limit, strict=True)])
    return results


def spread(name: str, values: list[float]) -> dict[str, float]:
    """The median under this name, the extremes under it with ``_lowest`` and ``_highest``."""
    return {name: statistics.median(values), f"{name}_lowest": min(values), f"{name}_highest": max(values)}
