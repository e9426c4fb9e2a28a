"""A network that has learned Gaussian mixtures exactly, whatever it predicts: what samplers and losses are held to."""

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, CosinePath, GaussianPath, PolynomialPath, VPPath
from fmlit.flows.predictions import Data, Noise, PreconditionedVelocity, Prediction, Score, Velocity
from fmlit.models.generative_model import GenerativeModel

PATHS = [CondOTPath(), CosinePath(), PolynomialPath(2.0), VPPath()]
PREDICTIONS = [Velocity(), Noise(), Data(), Score(), PreconditionedVelocity(0.5)]


class Oracle(nn.Module):
    """The mean of the prediction's target given x, one mixture per label; for labels None the last mixture."""

    def __init__(self, mixtures: list[GaussianMixture], path: GaussianPath, prediction: Prediction) -> None:
        super().__init__()
        self.mixtures, self.path, self.prediction = mixtures, path, prediction

    def forward(self, inputs: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        path = self.path
        x = inputs / self.prediction.network_input(path, torch.ones_like(inputs), t)
        beta = path.beta(t).reshape(-1, *(1,) * (x.ndim - 1))
        # Every target is linear in (z, eps), so its conditional mean is the target of the conditional means.
        means = [
            self.prediction.target(path, mixture.data(x, path, t), -beta * mixture.score(x, path, t), t)
            for mixture in self.mixtures
        ]
        rows = torch.arange(len(x))
        return torch.stack(means)[torch.full_like(rows, -1) if labels is None else labels, rows]


def oracle_model(
    mixtures: list[GaussianMixture], path: GaussianPath, prediction: Prediction | None = None
) -> GenerativeModel:
    """A model of one mixture, or of one per class with the unconditional one at the end."""
    prediction = prediction or Velocity()
    shape, classes = mixtures[0].means.shape[1:], len(mixtures) - 1 or None
    return GenerativeModel(Oracle(mixtures, path, prediction), path, prediction, shape, classes)


def quantiles(mixture: GaussianMixture, probabilities: np.ndarray) -> np.ndarray:
    """Quantiles of a mixture in one dimension."""
    means, stds = mixture.means.double().flatten().numpy(), mixture.stds.numpy()
    grid = np.linspace((means - 8 * stds).min(), (means + 8 * stds).max(), 200_001)
    return np.interp(probabilities, cdf(mixture, grid), grid)


def cdf(mixture: GaussianMixture, x: np.ndarray) -> np.ndarray:
    """Distribution function of a mixture in one dimension."""
    means, stds = mixture.means.double().flatten().numpy(), mixture.stds.numpy()
    return stats.norm.cdf(x[..., None], means, stds) @ mixture.weights.numpy()
