"""Models that have learned everything: the exact field of a mixture as a network, and the mixtures that are drawn."""

import torch
from torch import Tensor, nn

from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, GaussianPath
from fmlit.flows.predictions import Velocity
from fmlit.models.generative_model import GenerativeModel

TWO_POINTS = GaussianMixture([[-2.0], [2.0]], 0.0)


class ExactVelocity(nn.Module):
    """The marginal velocity of a mixture along a path, as a network ``net(x, t, labels)`` without labels."""

    def __init__(self, mixture: GaussianMixture, path: GaussianPath) -> None:
        super().__init__()
        self.mixture, self.path = mixture, path

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.mixture.velocity(x, self.path, t)


def exact_model(mixture: GaussianMixture, path: GaussianPath = CondOTPath()) -> GenerativeModel:
    """The model that an infinitely flexible network, trained without end on the mixture, becomes."""
    return GenerativeModel(ExactVelocity(mixture, path), path, Velocity(), mixture.means.shape[1:])


def checkerboard(points: int = 6) -> GaussianMixture:
    """The board of ``data.Checkerboard`` in smooth: ``points``^2 narrow Gaussians on each of its eight dark squares."""
    line = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    square = torch.cartesian_prod(line, line)
    corners = torch.tensor([[2 * k + row % 2 - 2, row - 2] for row in range(4) for k in range(2)], dtype=torch.float64)
    return GaussianMixture((corners[:, None] + square).flatten(0, 1), 0.6 / points)


def moons(points: int = 60) -> GaussianMixture:
    """The two interleaved half circles of ``data.Moons``, centred and enlarged, each of ``points`` narrow Gaussians."""
    angle = torch.linspace(0, torch.pi, points, dtype=torch.float64)
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    return GaussianMixture(1.6 * (torch.cat([upper, lower]) - torch.tensor([0.5, 0.25])), 0.1)
