"""Stochastic differential equations: Brownian motion and the linear SDE, by Euler-Maruyama."""

import math

import torch
from matplotlib.figure import Figure

from docs.draw import style
from fmlit import solvers
from fmlit.flows.diffusions import brownian_motion, ornstein_uhlenbeck


@style.styled
def brownian_paths(paths: int = 12, cloud: int = 2000, steps: int = 400) -> Figure:
    """Paths of W_t between the curves of one and two standard deviations, and the law of W_1."""
    times = torch.linspace(0, 1, steps + 1, dtype=style.PLANE_DTYPE)
    start = torch.zeros(cloud, 1, dtype=style.PLANE_DTYPE)
    generator = torch.Generator().manual_seed(1)
    states = solvers.euler_maruyama(*brownian_motion(), start, times, generator=generator, trajectory=True)[:, :, 0]
    figure, ((axes, side),) = style.panels(1, 2, (8.0, 3.4), sharey=True, width_ratios=[4, 1])
    for deviations in (2, 1):
        edge = deviations * times.sqrt()
        axes.fill_between(times, -edge, edge, color=style.MUTED, alpha=0.15, linewidth=0)
    axes.plot(times, states[:, :paths], linewidth=0.8)
    axes.annotate("$\\pm\\sqrt{t}$, $\\pm 2\\sqrt{t}$", (0.02, 2.2), color="#595959")
    axes.set(xlabel="$t$", ylabel="$W_t$", title=f"{paths} paths of Brownian motion", ylim=(-3.2, 3.2), xlim=(0, 1))
    line = torch.linspace(-3.2, 3.2, 200)
    side.hist(states[-1], bins=40, density=True, orientation="horizontal", color=style.DATA, alpha=0.5)
    side.plot(torch.exp(-(line**2) / 2) / math.sqrt(2 * math.pi), line, color=style.EXACT)
    side.set(title=f"$W_1$: {cloud:,} paths\nand $N(0, 1)$", xticks=[])
    return figure


@style.styled
def linear_sde(theta: float = 0.25, horizon: float = 12.0, steps: int = 1200) -> Figure:
    """dX = -theta X dt + sigma dW for growing sigma: from a flow to a walk around N(0, sigma^2 / (2 theta))."""
    times = torch.linspace(0, horizon, steps + 1, dtype=style.PLANE_DTYPE)
    start = torch.linspace(-8, 8, 9, dtype=style.PLANE_DTYPE)[:, None]
    figure, (axes,) = style.panels(1, 4, (10.4, 3.0), sharey=True)
    for panel, sigma in zip(axes, (0.0, 0.5, 1.0, 2.0), strict=True):
        generator = torch.Generator().manual_seed(3)
        drift, diffusion = ornstein_uhlenbeck(theta, sigma)
        states = solvers.euler_maruyama(drift, diffusion, start, times, generator=generator, trajectory=True)
        two_stds = 2 * sigma / math.sqrt(2 * theta)
        panel.axhspan(-two_stds, two_stds, color=style.MUTED, alpha=0.2, linewidth=0)
        panel.plot(times, states[:, :, 0], linewidth=0.7)
        panel.set(xlabel="$t$", title=f"$\\sigma = {sigma:g}$", xlim=(0, horizon), ylim=(-9.5, 9.5))
    axes[0].set_ylabel("$X_t$")
    figure.suptitle(
        f"$\\mathrm{{d}}X_t = -\\theta X_t\\,\\mathrm{{d}}t + \\sigma\\,\\mathrm{{d}}W_t$, $\\theta = {theta:g}$; "
        "gray: two standard deviations of $N(0, \\sigma^2 / 2\\theta)$",
        fontsize=10,
    )
    return figure
