"""Reports of an evaluation: a table, a plot, and both in W&B."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fmlit.core.files import file_errors
from fmlit.core.processes import ProcessGroup
from fmlit.evaluation.results import Measurement, Record, Results

SETTINGS = ("name", "weights", "nfe", "seconds")  # the columns of a table before the scores
# What a summary keeps of a record.
SUMMARY = ("name", "weights", "n", "draws", "nfe", "protocol", "scores", "seconds", "cost")


def report(
    results: Results, rows: Sequence[Sequence[Measurement]], ranks: ProcessGroup, project: str | None = None
) -> Record | None:
    """Complete the results, print them as a table, and write ``table.md`` and ``plot.png`` beside them.

    Args:
        results: the file that holds earlier measurements, and gets the new ones.
        rows: what the report shows, in this order: the measurement of each row, or several that differ in their noise.
        ranks: the processes that share the work; all of them must call.
        project: of W&B, which gets table and plot; None sends nothing.

    Returns:
        A summary, with the paths of the files and the main values of each row; None on all ranks but the first.
    """
    measured = [results.complete(draws, ranks) for draws in rows]
    if ranks.rank:
        return None
    records = [summarize(draws) for draws in measured]
    text = markdown(table(records))
    print(f"\n{text}")
    drawn = [record for record in records if "nfe" in record]
    picture = results.folder / "plot.png" if drawn else None
    with file_errors(results.folder):
        (results.folder / "table.md").write_text(text)
        if picture is not None:
            plot(drawn, picture)
    if project is not None:
        push(records, picture, project, results.folder)
    cells = [{key: record[key] for key in SUMMARY if key in record} for record in records]
    return {"results": str(results.path), "plot": str(picture) if picture else None, "cells": cells}


def summarize(draws: Sequence[Record]) -> Record:
    """One record of several that differ in their noise: mean, minimum and standard deviation of each score."""
    if len(draws) == 1:
        return draws[0]
    scores: dict[str, float] = {}
    for name in draws[0]["scores"]:
        values = [draw["scores"][name] for draw in draws]
        of_all = {"min": min(values), "spread": stdev(values)}
        scores |= {name: fmean(values), **{f"{name}_{kind}": value for kind, value in of_all.items()}}
    seconds = round(sum(draw["seconds"] for draw in draws), 2)
    return {**draws[0], "draws": len(draws), "scores": scores, "seconds": seconds}


def table(records: Sequence[Record]) -> list[list[Any]]:
    """A header, then one row for each record. A value that a record lacks is None."""
    names = list(dict.fromkeys(name for record in records for name in record["scores"]))
    rows = [
        [record.get(name) for name in SETTINGS] + [record["scores"].get(name) for name in names] for record in records
    ]
    return [[*SETTINGS, *names], *rows]


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, with aligned columns in its source too."""
    texts = [["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in texts]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def _line(record: Record) -> str:
    """The sampler's name without its steps: ``heun+cfg1.5`` of ``heun18+cfg1.5``."""
    solver = record["solver"].replace("_", "")  # as in names; dpmpp_2m has a digit of its own
    return solver + record["name"].removeprefix(solver).lstrip("0123456789")


def _several_weights(records: Sequence[Record]) -> bool:
    return len({record.get("weights") for record in records}) > 1


def plot(records: Sequence[Record], path: Path) -> None:
    """The first score against the number of network evaluations per image, one line per kind of sampler."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    score = next(iter(records[0]["scores"]))
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    several = _several_weights(records)
    for record in records:
        label = f"{_line(record)} {record['weights']}" if several else _line(record)
        lines.setdefault(label, []).append((record["nfe"], record["scores"][score]))
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
    protocol = records[0].get("protocol", "").split("-")
    axes.set_title("-".join(protocol[: -2 if several else -1]))  # all of it but what the lines differ in
    axes.legend()
    figure.savefig(path)


def push(records: Sequence[Record], picture: Path | None, project: str, folder: Path) -> None:
    """Send table and plot to W&B. Each results folder has one run there, which every later call continues."""
    import wandb

    from fmlit.training.loggers import WandbLogger

    logger = WandbLogger(project=project)
    logger.attach(folder)
    run = logger.experiment
    if logger.failed:
        return  # a line has said why
    run.name = f"{folder.absolute().parent.name}-evaluation"
    header, *rows = table(records)
    content: dict[str, Any] = {"evaluation": wandb.Table(columns=header, data=rows)}
    if picture is not None:
        content["evaluation_plot"] = wandb.Image(str(picture))
    run.log(content)
    several = _several_weights(records)
    titles = [f"{record['weights']}/{record['name']}" if several else record["name"] for record in records]
    values = {f"{title}/{k}": v for title, r in zip(titles, records, strict=True) for k, v in r["scores"].items()}
    run.summary.update(values)
    logger.finalize("success")
