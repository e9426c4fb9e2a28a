"""The toy recipes, trained by the command line as they stand, against the exact marginal velocity."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tests.helpers.tiny_cli import CONFIGS, train
from torch import Tensor

import fmlit
from fmlit import Checkerboard
from fmlit.models.generative_model import GenerativeModel
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath

LAST = 0.95
CORNERS = torch.tensor([[2 * k + row % 2 - 2, row - 2] for row in range(4) for k in range(2)], dtype=torch.float64)
TWO_POINTS = GaussianMixture(torch.tensor([[-2.0], [2.0]], dtype=torch.float64), 0.0)


class Oracle(NamedTuple):
    """Data and the exact marginal velocity of the CondOT path to them, in float64."""

    sample: Callable[[int, torch.Generator], Tensor]
    velocity: Callable[[Tensor, Tensor], Tensor]


def sample_board(n: int, generator: torch.Generator) -> Tensor:
    square = torch.randint(len(CORNERS), (n,), generator=generator)
    return CORNERS[square] + torch.rand(n, 2, generator=generator, dtype=torch.float64)


def board_velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[z | x_t = x] by truncated normals, as (E[z | x] - x) / (1 - t).

    Given x, z is N(x / t, ((1 - t) / t)^2 I) cut to the dark squares, each with a mass and a first moment per axis.
    """
    mean, std = (x / t[:, None])[:, None], ((1 - t) / t)[:, None, None]
    edges = (torch.stack([CORNERS, CORNERS + 1])[:, None] - mean) / std  # (low and high, B, squares, axes)
    mass = torch.special.ndtr(edges).diff(dim=0)[0]
    density = torch.exp(-(edges**2) / 2) / (2 * torch.pi) ** 0.5
    moment = mean * mass - std * density.diff(dim=0)[0]
    z = (moment * mass.flip(2)).sum(1) / mass.prod(2).sum(1, keepdim=True)
    return (z - x) / (1 - t)[:, None]


ORACLES = {
    "toy_two_points": Oracle(TWO_POINTS.sample, lambda x, t: TWO_POINTS.velocity(x, CondOTPath(), t)),
    "toy_checkerboard": Oracle(sample_board, board_velocity),
}


def points_on_the_path(oracle: Oracle, n: int) -> tuple[Tensor, Tensor]:
    """(x, t) with t uniform in [0, 0.95] and x from p_t."""
    generator = torch.Generator().manual_seed(0)
    z = oracle.sample(n, generator)
    eps = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    t = LAST * torch.rand(n, generator=generator, dtype=torch.float64)
    return CondOTPath().sample(z, eps, t), t


@torch.no_grad()
def relative_error(model: GenerativeModel, oracle: Oracle, n: int = 20_000) -> float:
    """(E |u_theta - u|^2 / E |u|^2)^(1/2) over t uniform in [0, 0.95] and x from p_t."""
    x, t = points_on_the_path(oracle, n)
    exact = oracle.velocity(x, t)
    return ((model.velocity(x.float(), t.float()) - exact).norm() / exact.norm()).item()


def test_the_closed_form_of_the_board_is_the_limit_of_fine_mixtures() -> None:
    """N x N Gaussians on each square, of the spread of one cell: their velocity converges to the board's."""
    x, t = points_on_the_path(ORACLES["toy_checkerboard"], 500)
    exact = board_velocity(x, t)
    for cells, bound in ((4, 5e-2), (24, 1e-4)):
        line = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        means = (CORNERS[:, None] + torch.cartesian_prod(line, line)).flatten(0, 1)
        fine = GaussianMixture(means, 1 / (12**0.5 * cells)).velocity(x, CondOTPath(), t)
        assert (fine - exact).norm() / exact.norm() < bound


def test_the_board_is_that_of_the_data() -> None:
    data = Checkerboard(1000).dataset("train").batch(range(1000))[0].double()
    inside = ((data[:, None] >= CORNERS) & (data[:, None] <= CORNERS + 1)).all(2)
    assert (inside.sum(1) >= 1).all()
    assert (inside.sum(0) > 80).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ORACLES)
def test_a_toy_recipe_learns_the_exact_field(name: str, tmp_path: Path) -> None:
    """Within 5 %. Prints the time: on two CPU cores where nothing else runs, less than a minute."""
    started = time.perf_counter()
    summary = train(tmp_path, "--config", str(CONFIGS / f"{name}.yaml")).summary
    seconds = time.perf_counter() - started
    error = relative_error(fmlit.load(Path(summary["checkpoint"])), ORACLES[name])
    print(f"{name}: relative L2 error {error:.4f} after {summary['steps']} steps, {seconds:.0f} s")
    assert error <= 0.05
