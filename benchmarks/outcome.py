"""What a measurement hands over, and how it is shown: lines while it runs, a table, benchmark.json."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.rounds import Round

# Columns of the table by the key of what they show: heading, format, and whether the extremes are shown beside it.
COLUMNS: dict[str, tuple[str, str, bool]] = {
    "images_per_second": ("images/s", ".4g", True),
    "tflops": ("TFLOP/s", ".3g", False),
    "ms_per_step": ("ms/step", ".4g", False),
    "seconds": ("seconds", ".4g", True),
    "seconds_per_1000": ("s per 1,000 images", ".4g", True),
    "ratio": ("ratio", ".3f", True),
    "ms_over_bare": ("ms/step over bare", ".3g", True),
    "evaluations": ("evaluations", "d", False),
    "share_communicating": ("share of time in all-reduce", ".1%", False),
    "share_waiting": ("share of time lost to it", ".1%", False),
    "peak_memory_gb": ("peak memory, GB", ".2f", False),
}


@dataclass(frozen=True)
class Outcome:
    """What was measured.

    Attributes:
        results: of each contender, figures by the keys of ``COLUMNS``; a missing one is None.
        rounds: the raw times.
        details: what the figures depend on.
        missing: contenders that were left out, and why.
    """

    results: dict[str, dict[str, Any]]
    rounds: list[Round]
    details: dict[str, Any]
    missing: dict[str, str] = field(default_factory=dict)

    def medians(self) -> dict[str, dict[str, Any]]:
        """The results without their extremes, rounded, for one line of JSON."""
        return {
            name: {key: _rounded(value) for key, value in result.items() if key in COLUMNS}
            for name, result in self.results.items()
        }

    def table(self) -> str:
        """The results in Markdown, a contender per row."""
        keys = [key for key in COLUMNS if any(key in result for result in self.results.values())]
        head = ["", *(COLUMNS[key][0] for key in keys)]
        rows = [[name, *(_cell(result, key) for key in keys)] for name, result in self.results.items()]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [head, ["-" * width for width in widths], *rows]
        return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def _cell(result: Mapping[str, Any], key: str) -> str:
    _, form, extremes = COLUMNS[key]
    if result.get(key) is None:
        return ""
    text = format(result[key], form)
    return f"{text} ({result[f'{key}_lowest']:{form}} to {result[f'{key}_highest']:{form}})" if extremes else text


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


class Report:
    """Lines on the error output while the measurement runs."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self._done = rounds, 0

    def __call__(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def round(self, done: Round) -> None:
        """A line about a round."""
        self._done += 1
        seconds = "  ".join(f"{name} {value:.3g} s" for name, value in done.seconds.items())
        self(f"round {self._done}/{self.rounds}, load {done.load_average[0]:.1f}: {seconds}")
