"""One look for all pictures, and how they are written: colors for color-blind readers too, and small files."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

# Okabe & Ito 2008. Noise is vermilion and data blue in every picture; what is exact is black.
NOISE, DATA, EXACT, PATH, ACCENT, MUTED = "#D55E00", "#0072B2", "#000000", "#009E73", "#CC79A7", "#8C8C8C"
CYCLE = [DATA, NOISE, PATH, ACCENT, "#E69F00", "#56B4E9"]
TIME = LinearSegmentedColormap.from_list("time", [NOISE, "#B9A7B0", DATA])  # of t from 0 to 1
DENSITY = LinearSegmentedColormap.from_list("density", ["#FFFFFF", "#BFD9EA", "#5FA3CE", "#0072B2", "#00466E"])
SIGNED = "PuOr_r"

STYLE: Any = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=CYCLE),
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "image.interpolation": "none",
}
PLANE_DTYPE = torch.float64
LARGEST = 140_000  # bytes


styled = mpl.rc_context(STYLE)  # decorates every function that draws


def panels(rows: int, columns: int, size: tuple[float, float], **arguments: Any) -> tuple[Figure, np.ndarray]:
    """A figure of ``size`` inches and its (rows, columns) axes."""
    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False, **arguments)


def plane_axes(axes: Axes, limit: float, title: str = "") -> None:
    """A square piece of the plane, without ticks."""
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[], title=title)
    for spine in axes.spines.values():
        spine.set(visible=True, color=MUTED, linewidth=0.6)


def plane_grid(limit: float, points: int) -> Tensor:
    """(points^2, 2) points of a regular grid over [-limit, limit]^2, the first coordinate running fastest."""
    line = torch.linspace(-limit, limit, points, dtype=PLANE_DTYPE)
    second, first = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([first, second], dim=-1).reshape(-1, 2)


def timed_lines(axes: Axes, paths: Tensor, times: Tensor, **style: Any) -> LineCollection:
    """Paths (len(times), B, 2) in the plane, colored by time from noise to data."""
    segments = torch.stack([paths[:-1], paths[1:]], dim=2).flatten(0, 1).numpy()  # (steps * B, 2 ends, 2)
    lines = LineCollection(list(segments), cmap=TIME, **style)
    lines.set_array(times[:-1].repeat_interleave(paths.shape[1]).numpy())
    lines.set_clim(0, 1)
    axes.add_collection(lines)
    return lines


def image_rows(axes: Axes, images: Tensor, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> None:
    """Images (rows, columns, C, H, W) in [-1, 1], gray or color, one pixel apart; larger values are clipped."""
    separated = torch.nn.functional.pad(images.float().clamp(-1, 1), (0, 1, 0, 1), value=1.0)
    sheet = separated.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows (H + 1), columns (W + 1), C)
    axes.imshow(((sheet[:-1, :-1] + 1) / 2).numpy(), cmap="gray", vmin=0, vmax=1)
    height, width = images.shape[-2:]
    axes.set_yticks([(height - 1) / 2 + (height + 1) * i for i in range(len(rows))], rows)
    axes.set_xticks([(width - 1) / 2 + (width + 1) * i for i in range(len(columns))], columns)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def pixels(figure: Figure) -> Image.Image:
    """The figure as an RGB picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def palette(picture: Image.Image, colors: int) -> Image.Image:
    """The picture in its most frequent colors, without dots in what is one color."""
    return picture.quantize(colors, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)


def save_png(figure: Figure, path: Path) -> None:
    """Where the picture has so many dots that it would be a large file, 256 colors have to do."""
    picture = pixels(figure)
    picture.save(path, optimize=True)
    if path.stat().st_size > LARGEST:
        palette(picture, 256).save(path, optimize=True)


def save_gif(frames: Iterable[Figure], path: Path, seconds: float, hold: float = 1.5) -> None:
    """An endless animation of ``seconds``, that rests for ``hold`` seconds on its last frame."""
    pictures = [pixels(frame) for frame in frames]
    shared = palette(pictures[len(pictures) // 2], 64)
    indexed = [picture.quantize(palette=shared, dither=Image.Dither.NONE) for picture in pictures]
    durations = [round(1000 * seconds / len(indexed))] * (len(indexed) - 1) + [round(1000 * hold)]
    indexed[0].save(path, save_all=True, append_images=indexed[1:], duration=durations, loop=0, optimize=True)
