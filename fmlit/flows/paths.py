"""Gaussian probability paths ``p_t(x | z) = N(alpha_t z, beta_t^2 I)`` from noise (t = 0) to data (t = 1).

A path is a pair of functions of time, ``alpha`` and ``beta``, and their derivatives. Everything else follows from
``x_t = alpha_t z + beta_t eps``, where ``z`` is a data point and ``eps`` is standard normal noise.

References:
    Holderrieth & Erives, "Introduction to Flow Matching and Diffusion Models", https://arxiv.org/abs/2506.02070
    Lipman et al. 2023, "Flow Matching for Generative Modeling", https://arxiv.org/abs/2210.02747
    Song et al. 2021, "Score-Based Generative Modeling through SDEs", https://arxiv.org/abs/2011.13456
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.tensors import check_like, expand_time


class GaussianPath(ABC):
    """The base class of all paths. A subclass defines ``alpha``, ``beta``, their derivatives, and ``time_of_sigma``.

    Those five methods take and return tensors of shape (B,). In the other methods, ``z`` is a data point, ``eps`` is
    standard normal noise, and ``x`` is a point on the path. Each of them has shape (B, *shape). The time ``t`` always
    has shape (B,) and lies in [0, 1].
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The scale of the data. It is 1 at t = 1."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """The standard deviation of the noise. It is 0 at t = 1."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """The time derivative ``d alpha / dt``."""

    @abstractmethod
    def beta_dot(self, t: Tensor) -> Tensor:
        """The time derivative ``d beta / dt``."""

    @abstractmethod
    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time at which ``beta / alpha`` equals ``sigma`` >= 0, or t = 0 if the path never reaches that level."""

    def sigma(self, t: Tensor) -> Tensor:
        """The noise level ``beta / alpha``, which EDM calls sigma. It is infinite where alpha is 0."""
        return self.beta(t) / self.alpha(t)

    def variance_dot(self, t: Tensor) -> Tensor:
        """``d beta^2 / dt = 2 beta beta_dot``. Paths whose ``beta_dot`` diverges at t = 1 return the finite limit."""
        return 2 * self.beta(t) * self.beta_dot(t)

    def sample(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Draw ``x_t = alpha z + beta eps`` from p_t(x | z)."""
        check_time(t)
        check_like(z, eps, "z and eps")
        return expand_time(self.alpha(t), z) * z + expand_time(self.beta(t), eps) * eps

    def velocity(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``u = alpha_dot z + beta_dot eps``: the target of conditional flow matching at ``sample(z, eps, t)``."""
        check_time(t)
        check_like(z, eps, "z and eps")
        return expand_time(self.alpha_dot(t), z) * z + expand_time(self.beta_dot(t), eps) * eps

    def conditional_velocity(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """``u_t(x | z) = (alpha_dot - beta_dot alpha / beta) z + (beta_dot / beta) x``. It needs beta > 0, so t < 1."""
        check_time(t)
        ratio = self.beta_dot(t) / self.beta(t)
        return expand_time(self.alpha_dot(t) - ratio * self.alpha(t), z) * z + expand_time(ratio, x) * x

    def conditional_score(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """``grad log p_t(x | z) = -(x - alpha z) / beta^2``. It needs beta > 0, so t < 1."""
        check_time(t)
        return -(x - expand_time(self.alpha(t), z) * z) / expand_time(self.beta(t).square(), x)


def check_time(t: Tensor) -> None:
    """Raise a UserError if a time lies outside [0, 1]. GPUs skip the check, because it would stall their queue."""
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and t.numel():
        low, high = (value.item() for value in t.detach().aminmax())  # comparing tensors would take three times as long
        if not (low >= 0 and high <= 1):
            raise UserError(f"t must lie in [0, 1], got values from {low:g} to {high:g}")


@dataclass(frozen=True)
class CondOTPath(GaussianPath):
    """``alpha = t``, ``beta = 1 - t``: straight lines from noise to data.

    This is the conditional optimal transport path of Lipman et al. 2023 (https://arxiv.org/abs/2210.02747). Rectified
    flow uses the same one (https://arxiv.org/abs/2209.03003).
    """

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def beta(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def beta_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def velocity(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``u = z - eps``, which is the same at all times."""
        check_time(t)
        check_like(z, eps, "z and eps")
        expand_time(t, z)  # fails where t is not (B,)
        return z - eps

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)


@dataclass(frozen=True)
class CosinePath(GaussianPath):
    """``alpha = sin(pi t / 2)``, ``beta = cos(pi t / 2)``: variance-preserving, without VP's singular end point."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def beta(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # exactly 0 at t = 1, where float32 cos(pi / 2) is -4e-8

    def alpha_dot(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.beta(t)

    def beta_dot(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.alpha(t)

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return 1 - 2 / math.pi * torch.atan(sigma)


@dataclass(frozen=True)
class PolynomialPath(GaussianPath):
    """``alpha = t^power``, ``beta = 1 - t^power``, for power >= 1.

    With power > 1 the velocity vanishes at t = 0, so it cannot be converted to ``z`` or ``eps`` there.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not self.power >= 1:
            raise UserError(f"PolynomialPath.power must be at least 1, got {self.power}")

    def alpha(self, t: Tensor) -> Tensor:
        return t**self.power

    def beta(self, t: Tensor) -> Tensor:
        return 1 - t**self.power

    def alpha_dot(self, t: Tensor) -> Tensor:
        return self.power * t ** (self.power - 1)

    def beta_dot(self, t: Tensor) -> Tensor:
        return -self.alpha_dot(t)

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return (1 / (1 + sigma)) ** (1 / self.power)


@dataclass(frozen=True)
class VPPath(GaussianPath):
    """The variance-preserving diffusion of DDPM, with t = 1 at the data.

    The noise rate grows linearly in ``s = 1 - t``: ``rate(s) = rate_min + s (rate_max - rate_min)``. Then
    ``log alpha = -s^2 (rate_max - rate_min) / 4 - s rate_min / 2`` and ``beta = sqrt(1 - alpha^2)``. At t = 0 a little
    data is left: alpha = 0.0066 with the defaults. Towards t = 1, ``beta_dot`` diverges like (1 - t)^-1/2.

    Source: Song et al. 2021, equation 32, https://arxiv.org/abs/2011.13456
    """

    rate_min: float = 0.1
    rate_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.rate_min <= self.rate_max:
            raise UserError(f"VPPath needs 0 < rate_min <= rate_max, got {self.rate_min} and {self.rate_max}")

    def _log_alpha(self, t: Tensor) -> Tensor:
        s = 1 - t
        return -(s**2) * (self.rate_max - self.rate_min) / 4 - s * self.rate_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def beta(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()  # 1 - alpha^2 without cancellation near t = 1

    def alpha_dot(self, t: Tensor) -> Tensor:
        return self.alpha(t) * (self.rate_min + (1 - t) * (self.rate_max - self.rate_min)) / 2

    def beta_dot(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.alpha_dot(t) / self.beta(t)

    def variance_dot(self, t: Tensor) -> Tensor:
        return -2 * self.alpha(t) * self.alpha_dot(t)

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        exponent = torch.log1p(sigma**2) / 2  # -log alpha, a quadratic in s
        root = (self.rate_min**2 / 4 + (self.rate_max - self.rate_min) * exponent).sqrt()
        return (1 - 2 * exponent / (self.rate_min / 2 + root)).clamp(min=0)
