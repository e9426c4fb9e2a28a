"""The distributions of training times, and the cut-offs near t = 0 and t = 1.

All cut-offs are defined here. Where every conversion that is needed is regular, time runs over the whole of [0, 1].

References:
    Karras et al. 2022 (EDM), https://arxiv.org/abs/2206.00364
    Kingma et al. 2021, "Variational Diffusion Models", https://arxiv.org/abs/2107.00630
    Esser et al. 2024, "Scaling Rectified Flow Transformers", https://arxiv.org/abs/2403.03206
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.flows.paths import GaussianPath, VPPath
from fmlit.flows.predictions import PreconditionedVelocity, Prediction, Velocity

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # EDM's noise levels (table 1), for data of order 1


class Limits(NamedTuple):
    """The interval of times that is used, with 0 <= start < end <= 1."""

    start: float
    end: float


def training_limits(path: GaussianPath, prediction: Prediction) -> Limits:
    """The times at which the target and its loss are finite. They cover all times that a sampler visits by default.

    A velocity network on a path with bounded derivatives needs no cut-off. The other cases do, and get the noise levels
    of sampling. On the VP path the velocity diverges like (1 - t)^-1/2. Preconditioning divides by s, which vanishes at
    t = 0 on a polynomial path. Every other prediction divides by alpha or beta when it is converted.
    """
    ends = torch.tensor([0.0, 1.0])
    regular = _is_regular(path, prediction) and bool((prediction.gains(path, ends).velocity > 0).all())
    return Limits(0.0, 1.0) if regular else sigma_limits(path)


def sampling_limits(
    path: GaussianPath,
    prediction: Prediction,
    stochastic: bool = False,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
) -> Limits:
    """The times at which the field that a sampler follows is regular.

    An ODE that follows a velocity network runs over all of [0, 1], except on the VP path. Everything else needs a
    conversion to z, eps or the score, and stays where ``sigma_min <= beta / alpha <= sigma_max``. Every SDE is such a
    case, because it needs the score. A sampler that ends before t = 1 closes with one denoising step.
    """
    regular = _is_regular(path, prediction) and not stochastic
    return Limits(0.0, 1.0) if regular else sigma_limits(path, sigma_min, sigma_max)


def _is_regular(path: GaussianPath, prediction: Prediction) -> bool:
    """Whether the network's velocity is finite at every time."""
    return isinstance(prediction, (Velocity, PreconditionedVelocity)) and not isinstance(path, VPPath)


def sigma_limits(path: GaussianPath, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> Limits:
    """The times at which ``beta / alpha`` equals sigma_max and sigma_min."""
    if not 0 < sigma_min < sigma_max:
        raise UserError(f"noise levels must satisfy 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    start, end = path.time_of_sigma(torch.tensor([sigma_max, sigma_min], dtype=torch.float64)).tolist()
    return Limits(start, end)


class TimeDistribution(ABC):
    """A distribution of training times, given by its quantile function.

    With ``stratified``, each of n draws falls into its own one of n equally likely strata, in random order. Every
    single draw keeps the same distribution, and the mean over a batch has a lower variance (Kingma et al. 2021,
    appendix I).
    """

    stratified: bool

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The times below which fractions u in [0, 1] of all draws lie, in the shape of u."""

    def sample(self, n: int, generator: torch.Generator, limits: Limits = Limits(0.0, 1.0)) -> Tensor:
        """Draw n float32 times (n,) on the generator's device, clamped to the limits."""
        device = generator.device
        u = torch.rand(n, generator=generator, device=device, dtype=torch.float32)  # whatever the default dtype is
        if self.stratified:
            u = (torch.randperm(n, generator=generator, device=device) + u) / n
        return self.quantile(u).clamp(limits.start, limits.end)


@dataclass(frozen=True)
class UniformTime(TimeDistribution):
    """Times uniform in [0, 1]."""

    stratified: bool = False

    def quantile(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormalTime(TimeDistribution):
    """``t = sigmoid(n)`` with n ~ N(mean, std^2) (Esser et al. 2024, section 3.1).

    On the CondOT path this is EDM's log-normal noise level, because ``ln sigma = -logit t``. EDM's
    ``ln sigma ~ N(-1.2, 1.2^2)`` is ``LogitNormalTime(mean=1.2, std=1.2)``.
    """

    mean: float = 0.0
    std: float = 1.0
    stratified: bool = False

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise UserError(f"LogitNormalTime.std must be positive, got {self.std}")

    def quantile(self, u: Tensor) -> Tensor:
        tiny = torch.finfo(u.dtype).eps
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.clamp(tiny / 2, 1 - tiny)))
