"""The two-point toy z = -2, +2: conditional against marginal path, velocity and score, over time and space."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from torch import Tensor

from docs.draw import style
from docs.draw.oracle import TWO_POINTS
from fmlit import solvers
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, GaussianPath

LIMIT, LAST = 3.2, 0.97  # at t = 1 two Diracs have neither density nor score
MAGNITUDES = np.array([0.25, 0.5, 1, 2, 5, 10, 20, 50, 100])
DENSITIES: Any = {"levels": np.linspace(0, 0.8, 17), "cmap": style.DENSITY, "extend": "max"}
VELOCITIES: Any = {"levels": np.linspace(-6.25, 6.25, 26), "cmap": style.SIGNED, "extend": "both"}
SCORES: Any = {**VELOCITIES, "levels": [*-MAGNITUDES[::-1], *MAGNITUDES], "norm": SymLogNorm(0.25)}
TICKS = [0, 0.2, 0.4, 0.6, 0.8], [-6, -3, 0, 3, 6], [-100, -10, -1, 1, 10, 100]


def _over_time(axes: Axes, function: Callable[[Tensor, Tensor], Tensor], **colors: Any) -> ContourSet:
    """``function(x (B, 1), t (B,))`` as colors over the rectangle of times and places."""
    t, x = torch.linspace(0, LAST, 160, dtype=torch.float64), torch.linspace(-LIMIT, LIMIT, 160, dtype=torch.float64)
    places, times = torch.meshgrid(x, t, indexing="ij")
    values = function(places.reshape(-1, 1), times.flatten()).reshape(places.shape)
    return axes.contourf(t, x, values, **colors)


def _row(axes: list[Axes], name: str, given: str, mixture: GaussianMixture, path: GaussianPath) -> None:
    """Path, velocity and score of a mixture. That of one Dirac at z is the conditional one, given z."""
    times = torch.linspace(0, LAST, 98, dtype=torch.float64)
    starts = torch.linspace(-1.9, 1.9, 9, dtype=torch.float64)[:, None]
    lines = solvers.rk4(lambda x, t: mixture.velocity(x, path, t), starts, times, trajectory=True)[:, :, 0]

    density = _over_time(axes[0], lambda x, t: mixture.log_prob(x, path, t).exp(), **DENSITIES)
    velocity = _over_time(axes[1], lambda x, t: mixture.velocity(x, path, t), **VELOCITIES)
    score = _over_time(axes[2], lambda x, t: mixture.score(x, path, t), **SCORES)
    titles = f"$p_t(x{given})$", f"$u_t(x{given})$", f"$\\nabla \\log p_t(x{given})$"
    for panel, drawn, title, ticks in zip(axes, (density, velocity, score), titles, TICKS, strict=True):
        panel.set(title=f"{name} {title}", xlim=(0, 1), ylim=(-LIMIT, LIMIT))
        panel.figure.colorbar(drawn, ax=panel, pad=0.01, ticks=ticks, format="%g")
        panel.plot([1] * len(mixture.means), mixture.means[:, 0], "o", color=style.EXACT, markersize=5, clip_on=False)
    axes[1].plot(times, lines, color=style.EXACT, linewidth=0.7)
    axes[0].set_ylabel("$x$")


@style.styled
def two_points() -> Figure:
    """Rows: given z = 2, and marginal over both points. Columns: density, velocity with its flow, score, over time."""
    path = CondOTPath()
    figure, axes = style.panels(2, 3, (10.8, 5.4), sharex=True, sharey=True)
    _row(list(axes[0]), "conditional", " \\mid z = 2", GaussianMixture([[2.0]], 0.0), path)
    _row(list(axes[1]), "marginal", "", TWO_POINTS, path)
    for panel in axes[1]:
        panel.set_xlabel("$t$")
    return figure
