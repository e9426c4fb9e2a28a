"""The curves of a run, from its metrics.csv: loss in total and per bin of t, and the quality of samples."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.draw import style
from fmlit.core.errors import UserError

Points = tuple[list[float], list[float]]  # images seen, values


def read_metrics(file: Path) -> dict[str, Points]:
    """Every metric of a metrics.csv: the images seen at which it was written, and its values.

    Raises:
        ValueError: the file holds no metrics by images seen.
    """
    found: dict[str, Points] = {}
    with open(file, newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            for name, value in row.items():
                if value and name not in ("step", "images_seen"):
                    images, values = found.setdefault(name, ([], []))
                    images.append(float(row["images_seen"]))
                    values.append(float(value))
    if not found:
        raise UserError(f"{file} holds no metrics yet")
    return found


@style.styled
def training_curves(runs: Mapping[str, Mapping[str, Points]]) -> Figure:
    """Loss in total and per bin of t against images seen: one panel for each run, by its title."""
    figure, axes = style.panels(1, len(runs), (1.0 + 4.2 * len(runs), 2.9))
    for panel, (title, metrics) in zip(axes[0], runs.items(), strict=True):
        bins = sorted(name for name in metrics if name.startswith("loss_t/"))
        _draw(panel, metrics, bins)
        panel.plot(*metrics["loss"], color=style.EXACT, label="all t")
        panel.set(xlabel="images seen", ylabel="loss", yscale="log", title=title)
        panel.legend(fontsize=7, ncols=2)
    return figure


def _draw(axes: Axes, metrics: Mapping[str, Points], bins: Sequence[str]) -> None:
    for number, name in enumerate(bins):
        share = number / max(1, len(bins) - 1)
        axes.plot(*metrics[name], color=style.TIME(share), linewidth=1, label=f"t {name.removeprefix('loss_t/')}")
