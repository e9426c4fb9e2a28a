"""Ordinary differential equations: trajectory, vector field, flow, and the linear ODE with its closed form."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from docs.draw import style
from fmlit import solvers
from fmlit.core.tensors import Field
from fmlit.flows.diffusions import ornstein_uhlenbeck

LIMIT = 2.0


def swirl(x: Tensor, t: Tensor) -> Tensor:
    """A vector field on the plane (B, 2) that turns about the origin, inwards, and bends with the second coordinate."""
    first, second = x.unbind(1)
    return torch.stack([-3.2 * second - 0.6 * first, 2.4 * first - 0.6 * second + 0.8 * torch.sin(2 * second)], dim=1)


def waves(x: Tensor, t: Tensor) -> Tensor:
    """A time-dependent vector field on the plane (B, 2) that shears it along both axes."""
    first, second = x.unbind(1)
    return torch.stack([torch.cos(1.5 * second + 2 * t), 0.9 * torch.sin(1.7 * first - t)], dim=1)


def arrows(axes: Axes, field: Field, time: float, limit: float, points: int = 13, **options: Any) -> None:
    """The field at one time, as arrows on a grid."""
    x = style.plane_grid(0.93 * limit, points)
    u = field(x, torch.full((len(x),), time, dtype=x.dtype))
    axes.quiver(*x.T, *u.T, **{"color": style.MUTED, "angles": "xy", "width": 0.004, **options})


@style.styled
def trajectory_field_ode() -> Figure:
    """A trajectory X_t; a vector field u; an ODE, which asks for the trajectory along the field, by Euler's method."""
    start = torch.tensor([[1.7, 0.2]], dtype=style.PLANE_DTYPE)
    times = torch.linspace(0, 1, 101, dtype=style.PLANE_DTYPE)
    coarse = times[::10]
    exact = solvers.dopri5(swirl, start, times, rtol=1e-8, atol=1e-8, trajectory=True)
    polygon = solvers.euler(swirl, start, coarse, trajectory=True)[:, 0]
    figure, ((left, middle, right),) = style.panels(1, 3, (9.6, 3.05))

    style.plane_axes(left, LIMIT, "a trajectory $t \\mapsto X_t$")
    lines = style.timed_lines(left, exact, times, linewidths=2.5)
    figure.colorbar(lines, ax=left, label="$t$", shrink=0.7, ticks=[0, 0.5, 1], location="left")
    for time, offset in ((0, (-3, -15)), (50, (2, 8)), (100, (-3, -15))):
        left.plot(*exact[time, 0], "o", color=style.TIME(time / 100), markersize=6)
        left.annotate(f"$X_{{{time / 100:g}}}$", exact[time, 0].tolist(), offset, textcoords="offset points")

    style.plane_axes(middle, LIMIT, "a vector field $u_t(x)$")
    arrows(middle, swirl, 0.0, LIMIT)

    style.plane_axes(right, LIMIT, "an ODE $\\mathrm{d}X_t/\\mathrm{d}t = u_t(X_t)$")
    arrows(right, swirl, 0.0, LIMIT, alpha=0.45)
    right.plot(*exact[:, 0].T, color=style.DATA)
    right.plot(*polygon.T, "o--", color=style.NOISE, markersize=3.5, linewidth=1)
    label: Any = {"textcoords": "offset points", "ha": "center", "va": "top"}
    right.annotate("solution", exact[50, 0].tolist(), (0, -8), color=style.DATA, **label)
    right.annotate("Euler,\n10 steps", polygon[-1].tolist(), (6, -8), color=style.NOISE, **label)
    return figure


@style.styled
def flow() -> Figure:
    """The flow psi_t of many starting points: a square grid, carried along and never torn or folded over."""
    grid = style.plane_grid(1.4, 121).reshape(121, 121, 2)
    lines = torch.stack([grid[::12], grid[:, ::12].transpose(0, 1)])  # (direction, line, point, 2)
    times = torch.linspace(0, 1, 61, dtype=style.PLANE_DTYPE)
    states = solvers.rk4(waves, lines.reshape(-1, 2), times, trajectory=True)
    figure, (axes,) = style.panels(1, 4, (10.4, 2.9))
    for panel, k in zip(axes, (0, 20, 40, 60), strict=True):
        time = times[k].item()
        style.plane_axes(panel, 2.6, f"$\\psi_t(x_0)$ at $t = {time:.2g}$")
        arrows(panel, waves, time, 2.6, points=12, alpha=0.7)
        for line in states[k].reshape(-1, 121, 2):
            panel.plot(*line.T, color=style.NOISE, linewidth=0.8)
    return figure


@style.styled
def linear_ode(theta: float = 3.0, steps: int = 10) -> Figure:
    """dX/dt = -theta X by Euler and Heun, on its closed form x e^(-theta t)."""
    drift, _ = ornstein_uhlenbeck(theta, 0.0)
    starts = torch.linspace(-2, 2, 9, dtype=style.PLANE_DTYPE)[:, None]
    fine, coarse = (torch.linspace(0, 1, n + 1, dtype=style.PLANE_DTYPE) for n in (200, steps))
    figure, ((axes,),) = style.panels(1, 1, (5.6, 3.6))
    axes.plot(fine, starts.T * torch.exp(-theta * fine)[:, None], color=style.EXACT, linewidth=0.9)
    for solver, color, marker in ((solvers.euler, style.NOISE, "o"), (solvers.heun, style.DATA, "x")):
        states = solver(drift, starts, coarse, trajectory=True)[:, :, 0]
        axes.plot(coarse, states, marker, color=color, markersize=4)
        axes.plot([], [], marker, color=color, label=f"{solver.__name__.capitalize()}, {steps} steps")
    axes.plot([], [], color=style.EXACT, linewidth=0.9, label=f"$x_0\\, e^{{-\\theta t}}$, $\\theta = {theta:g}$")
    axes.set(
        xlabel="$t$", ylabel="$X_t$", title="the flow of a linear ODE, $\\mathrm{d}X_t = -\\theta X_t\\,\\mathrm{d}t$"
    )
    axes.legend(loc="upper right")
    return figure
