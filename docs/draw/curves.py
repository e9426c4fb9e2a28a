"""The curves of runs, from their metrics.csv: the loss in total and per bin of t."""

import csv
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from fmlit.core.errors import UserError

Points = tuple[list[float], list[float]]  # images seen, values


def read_metrics(file: Path) -> dict[str, Points]:
    """Every metric of a metrics.csv: the images seen at which it was written, and its values.

    Raises:
        UserError: there is no such file, or it holds no metrics yet.
    """
    if not file.is_file():
        raise UserError(f"there is no {file}; give folders of runs, such as runs/quickstart")
    found: dict[str, Points] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            for name, value in row.items():
                if value and name not in ("step", "images_seen"):
                    images, values = found.setdefault(name, ([], []))
                    images.append(float(row["images_seen"]))
                    values.append(float(value))
    if not found:
        raise UserError(f"{file} holds no metrics yet")
    return found


def training_curves(runs: Mapping[str, Mapping[str, Points]], colors: str | Colormap = "viridis") -> Figure:
    """Draw the loss against images seen, in total and per bin of t: one panel for each run, under its title.

    Save the figure with its ``savefig``::

        training_curves({"quickstart": read_metrics(Path("runs/quickstart/metrics.csv"))}).savefig("loss.png")

    Args:
        runs: what ``read_metrics`` returns, by title.
        colors: of the bins, from t = 0 to 1.
    """
    colormap = mpl.colormaps.get_cmap(colors)
    figure = Figure(figsize=(1.0 + 4.2 * len(runs), 2.9), layout="constrained")
    axes = figure.subplots(1, len(runs), squeeze=False)
    for panel, (title, metrics) in zip(axes[0], runs.items(), strict=True):
        bins = sorted(name for name in metrics if name.startswith("loss_t/"))
        for number, name in enumerate(bins):
            color = colormap(number / max(1, len(bins) - 1))
            panel.plot(*metrics[name], color=color, linewidth=1, label=f"t {name.removeprefix('loss_t/')}")
        panel.plot(*metrics["loss"], color="black", label="all t")
        panel.set(xlabel="images seen", ylabel="loss", yscale="log", title=title)
        panel.legend(fontsize=7, ncols=2)
    return figure
