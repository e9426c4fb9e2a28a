"""Time grids: the times at which a sampler stops on its way from noise to data."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.flows.paths import GaussianPath
from fmlit.flows.times import SIGMA_MAX, SIGMA_MIN, Limits, sigma_limits


class Grid(ABC):
    """The times at which a sampler stops on its way from noise to data.

    ``times(path, steps, limits)`` increases strictly, in float64. Where it can end at t = 1 it has ``steps + 1``
    entries. Where it must end before, it has ``steps``: the sampler's last step is then one denoising step from
    ``times[-1]`` to data, as in EDM, and the number of steps is the same.

    ``sigma_min`` and ``sigma_max`` bound beta / alpha for samplers that cannot walk over the whole clock.
    """

    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX

    @abstractmethod
    def times(self, path: GaussianPath, steps: int, limits: Limits = Limits(0.0, 1.0)) -> Tensor:
        """(steps + 1,) times ending at 1, or (steps,) times ending below 1."""


def _points(steps: int, limits: Limits) -> Tensor:
    """Fractions 0 ... 1 for a grid over ``limits``: one fewer where a denoising step will close it."""
    closing = limits.end < 1
    if steps < (2 if closing else 1):
        raise UserError(f"steps must be at least {2 if closing else 1} for this grid, got {steps}")
    return torch.linspace(0, 1, steps if closing else steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class UniformGrid(Grid):
    """Equal steps in t."""

    def times(self, path: GaussianPath, steps: int, limits: Limits = Limits(0.0, 1.0)) -> Tensor:
        return limits.start + (limits.end - limits.start) * _points(steps, limits)


def _within(path: GaussianPath, limits: Limits, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """(sigma_max, sigma_min), narrowed to what the limits allow."""
    window = sigma_limits(path, sigma_min, sigma_max)
    start, end = max(window.start, limits.start), min(window.end, limits.end)
    first, last = path.sigma(torch.tensor([start, end], dtype=torch.float64)).tolist()
    return first, last


@dataclass(frozen=True)
class EDMGrid(Grid):
    """Equal steps in sigma^(1/rho), sigma = beta / alpha (Karras et al. 2022, eq. 5), on any path.

    Ends at sigma_min; the closing denoising step is EDM's Euler step to sigma = 0.
    """

    rho: float = 7.0
    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise UserError(f"EDMGrid.rho must be positive, got {self.rho}")

    def times(self, path: GaussianPath, steps: int, limits: Limits = Limits(0.0, 1.0)) -> Tensor:
        first, last = _within(path, limits, self.sigma_min, self.sigma_max)
        fractions = _points(steps, Limits(0.0, 0.0))
        roots = first ** (1 / self.rho) + fractions * (last ** (1 / self.rho) - first ** (1 / self.rho))
        return path.time_of_sigma(roots**self.rho)


@dataclass(frozen=True)
class LogitSNRGrid(Grid):
    """Equal steps in log(alpha / beta): uniform in the logarithm of the signal-to-noise ratio (Lu et al. 2022)."""

    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX

    def times(self, path: GaussianPath, steps: int, limits: Limits = Limits(0.0, 1.0)) -> Tensor:
        first, last = _within(path, limits, self.sigma_min, self.sigma_max)
        fractions = _points(steps, Limits(0.0, 0.0))
        return path.time_of_sigma(torch.exp(math.log(first) + fractions * math.log(last / first)))
