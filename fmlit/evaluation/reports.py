"""Results of an evaluation: a file of JSON lines that an interrupted one goes on from, a table, a plot, W&B."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmlit.core.errors import FileError
from fmlit.core.files import file_errors

log = logging.getLogger(__name__)

Record = dict[str, Any]  # what a cell of a sweep is of, and under "scores" what came out

SETTINGS = ("name", "weights", "nfe", "seconds")  # what a table shows of a record beside its scores


class Results:
    """``results.jsonl`` in a folder: one line per cell of a sweep, appended when the cell is done.

    A cell is known by its identity, which holds everything that its scores depend on. Two jobs may share the file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise FileError(f"cannot write {self.path}: its folder is read-only; choose another with --out")

    def find(self, identity: Record) -> Record | None:
        """The record of an earlier evaluation, if there is one."""
        key = _key(identity)
        return next((record for record in reversed(self._read()) if record["key"] == key), None)

    def add(self, identity: Record, outcome: Record) -> Record:
        """Append a line, in one write; returns the record."""
        record = {"key": _key(identity), **identity, **outcome}
        half_a_line = self.path.exists() and not self.path.read_bytes().endswith(b"\n")  # of a killed process
        with open(self.path, "ab") as file:
            file.write(b"\n" * half_a_line + json.dumps(record).encode() + b"\n")
        return record

    def _read(self) -> list[Record]:
        records = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else []:
            try:
                record = json.loads(line)
                if "key" in record:
                    records.append(record)
            except (TypeError, ValueError):
                log.warning("skipped a damaged line of %s", self.path)
        return records


def _key(identity: Record) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def table(records: Sequence[Record]) -> list[list[Any]]:
    """A header and one row for each record; None where a record lacks a value."""
    names = list(dict.fromkeys(name for record in records for name in record["scores"]))
    rows = [
        [record.get(name) for name in SETTINGS] + [record["scores"].get(name) for name in names] for record in records
    ]
    return [[*SETTINGS, *names], *rows]


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """A table whose source is aligned as well."""
    texts = [["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in texts]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def _line(record: Record) -> str:
    """The sampler's name without its steps: ``heun+cfg1.5`` of ``heun18+cfg1.5``."""
    solver = record["solver"].replace("_", "")  # as in names; dpmpp_2m has a digit of its own
    return solver + record["name"].removeprefix(solver).lstrip("0123456789")


def plot(records: Sequence[Record], path: Path) -> None:
    """The first score against the number of network evaluations per image, one line per kind of sampler."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    score = next(iter(records[0]["scores"]))
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        lines.setdefault(_line(record), []).append((record["nfe"], record["scores"][score]))
    for label, points in lines.items():
        nfe, values = zip(*sorted(points), strict=True)
        axes.plot(nfe, values, "o-", label=label)
    axes.set(xlabel="network evaluations per image", ylabel=score, xscale="log")
    axes.set_yscale("log" if score.startswith(("fid", "fd")) else "linear")  # the others may be negative, or shares
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_title(records[0].get("protocol", "").rpartition("-")[0])  # all of it but the sampler
    axes.legend()
    figure.savefig(path)


def push(records: Sequence[Record], picture: Path | None, project: str, folder: Path, name: str) -> None:
    """Send table and plot to W&B: one run per results folder, however often the sweep is gone on with."""
    import wandb

    from fmlit.training.loggers import WandbLogger

    logger = WandbLogger(project=project)
    logger.attach(folder)
    run = logger.experiment
    run.name = name
    header, *rows = table(records)
    content: dict[str, Any] = {"evaluation": wandb.Table(columns=header, data=rows)}
    if picture is not None:
        content["evaluation_plot"] = wandb.Image(str(picture))
    run.log(content)
    run.summary.update({f"{r['name']}/{score}": v for r in records for score, v in r["scores"].items()})
    logger.finalize("success")
