"""A set in the plane: conditional against marginal path, velocity and score, and both simulated by ODE and SDE."""

from collections.abc import Iterator

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from docs.draw import style
from docs.draw.odes import arrows
from docs.draw.oracle import checkerboard, exact_model, moons
from fmlit import solvers
from fmlit.flows.diffusions import BetaDiffusion, sde_drift
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, GaussianPath

LIMIT = 3.0
CONDITION = GaussianMixture([[0.6, 1.5]], 0.0)  # one Dirac at z: its fields are the conditional ones, given z


def _draw_density(axes: Axes, mixture: GaussianMixture, path: GaussianPath, time: float, limit: float = LIMIT) -> None:
    """p_t(x), relative to its maximum, as shades."""
    x = style.plane_grid(limit, 81)
    density = mixture.log_prob(x, path, torch.full((len(x),), time, dtype=x.dtype)).reshape(81, 81)
    span = (-limit, limit, -limit, limit)
    relative = (density - density.max()).exp().numpy()
    axes.imshow(relative, extent=span, origin="lower", cmap=style.DENSITY, vmin=0, vmax=1.6, interpolation="bilinear")


def _start(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, dtype=style.PLANE_DTYPE, generator=torch.Generator().manual_seed(seed))


@style.styled
def plane_fields(time: float = 0.75, limit: float = 2.4) -> Figure:
    """Rows: given z, and marginal over a checkerboard of data. Columns: density, velocity, score, at one time."""
    path = CondOTPath()
    figure, axes = style.panels(2, 3, (8.4, 5.9))
    for row, mixture, name, given in zip(
        axes, (CONDITION, checkerboard()), ("conditional", "marginal"), (" \\mid z", ""), strict=True
    ):
        names = f"path $p_t(x{given})$", f"velocity $u_t(x{given})$", f"score $\\nabla\\log p_t(x{given})$"
        for panel, title in zip(row, names, strict=True):
            style.plane_axes(panel, limit, f"{name} {title}")
            _draw_density(panel, mixture, path, time, limit)
        model = exact_model(mixture, path)
        arrows(row[1], model.velocity, time, limit, 16, color=style.EXACT)
        arrows(row[2], model.score, time, limit, 16, color=style.EXACT)
    for panel in axes[0]:
        panel.plot(*CONDITION.means[0], "*", color=style.NOISE, markersize=11)
    axes[0, 0].annotate("$z$", CONDITION.means[0].tolist(), (8, 2), textcoords="offset points", color=style.NOISE)
    figure.suptitle(
        f"$t = {time:g}$: the score points uphill, the velocity of the CondOT path towards $E[z \\mid x]$", fontsize=10
    )
    return figure


@style.styled
def plane_simulations(n: int = 700, steps: int = 200) -> Figure:
    """Samples of the ODE with the conditional and the marginal velocity, and of an SDE, on the exact densities."""
    path, last = CondOTPath(), 0.98
    times = torch.linspace(0, last, steps + 1, dtype=style.PLANE_DTYPE)
    board = checkerboard()

    def ode(mixture: GaussianMixture) -> Tensor:
        return solvers.heun(exact_model(mixture, path).velocity, _start(n), times, trajectory=True)

    exact, sigma = exact_model(board, path), BetaDiffusion(1.5).along(path)
    drift = sde_drift(exact.velocity, exact.score, sigma)
    generator = torch.Generator().manual_seed(1)
    stochastic = solvers.euler_maruyama(drift, sigma, _start(n), times, generator=generator, trajectory=True)
    rows = (
        ("conditional ODE, given $z$", CONDITION, ode(CONDITION)),
        ("marginal ODE", board, ode(board)),
        ("marginal SDE, $\\sigma_t = 1.5\\,\\beta_t$", board, stochastic),
    )
    figure, axes = style.panels(3, 5, (10.4, 6.5))
    stops = [round(share * steps) for share in (0, 1 / 3, 2 / 3, 1)]
    for row, (name, mixture, states) in zip(axes, rows, strict=True):
        for panel, k in zip(row[:4], stops, strict=True):
            style.plane_axes(panel, LIMIT)
            _draw_density(panel, mixture, path, times[k].item())
            panel.scatter(*states[k].T, s=3, color=style.NOISE, linewidths=0, alpha=0.8)
        style.plane_axes(row[4], LIMIT)
        style.timed_lines(row[4], states[:, :20], times, linewidths=0.8)
        row[0].set_ylabel(name)
    titles = [*(f"$t = {times[k]:.2g}$" for k in stops), "20 trajectories"]
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title)
    return figure


def _transport(n: int, steps: int) -> tuple[Tensor, Tensor]:
    """Times (steps + 1,) and states (steps + 1, n, 2) of the flow that carries noise onto the two moons."""
    times = torch.linspace(0, 1, steps + 1, dtype=style.PLANE_DTYPE)
    return times, solvers.heun(exact_model(moons()).velocity, _start(n), times, trajectory=True)


@style.styled
def gaussian_to_data(n: int = 1000) -> Figure:
    """The flow that carries a Gaussian onto data: where it starts, the way, where it ends."""
    times, states = _transport(n, 100)
    figure, (axes,) = style.panels(1, 3, (9.6, 3.05))
    titles = "$X_0 \\sim N(0, I)$", "$X_t$, for 150 starting points", "$X_1 \\sim p_{\\mathrm{data}}$"
    for panel, title in zip(axes, titles, strict=True):
        style.plane_axes(panel, LIMIT, title)
    axes[0].scatter(*states[0].T, s=5, color=style.NOISE, linewidths=0)
    lines = style.timed_lines(axes[1], states[:, :150], times, linewidths=0.8)
    figure.colorbar(lines, ax=axes.tolist(), label="$t$", shrink=0.7, ticks=[0, 0.5, 1])
    axes[2].scatter(*states[-1].T, s=5, color=style.DATA, linewidths=0)
    return figure


def gaussian_to_data_frames(frames: int = 60, n: int = 1200) -> Iterator[Figure]:
    """The same flow in motion, colored by the first coordinate of where a point starts."""
    times, states = _transport(n, frames - 1)
    for time, state in zip(times.tolist(), states, strict=True):
        yield _frame(time, state, states[0, :, 0])


@style.styled
def _frame(time: float, points: Tensor, colors: Tensor) -> Figure:
    figure, ((axes,),) = style.panels(1, 1, (3.6, 3.8))
    style.plane_axes(axes, LIMIT, f"$t = {time:.2f}$")
    axes.scatter(*points.T, s=5, c=colors, cmap="viridis", vmin=-2, vmax=2, linewidths=0)
    return figure
