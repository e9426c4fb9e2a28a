"""Gaussian probability paths p_t(x | z) = N(alpha_t z, beta_t^2 I) from noise (t = 0) to data (t = 1).

A path is two functions of time with their derivatives. Everything else follows from ``x_t = alpha_t z + beta_t eps``.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.tensors import check_like, expand_time


class GaussianPath(ABC):
    """A path is given by ``alpha``, ``beta``, their time derivatives, and the inverse of ``sigma = beta / alpha``.

    All five take and return tensors of shape (B,). ``z`` is a data point, ``eps`` standard normal noise, ``x`` a point
    on the path, each (B, *shape); ``t`` is always (B,), in [0, 1].
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data; 1 at t = 1."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise; 0 at t = 1."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def beta_dot(self, t: Tensor) -> Tensor:
        """d beta / dt."""

    @abstractmethod
    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time at which ``beta / alpha`` equals ``sigma``, for sigma >= 0; t = 0 if the path never gets there."""

    def sigma(self, t: Tensor) -> Tensor:
        """Noise-to-data ratio ``beta / alpha``: the noise level of EDM (infinite where alpha is 0)."""
        return self.beta(t) / self.alpha(t)

    def variance_dot(self, t: Tensor) -> Tensor:
        """d beta^2 / dt = 2 beta beta_dot. A path whose beta_dot diverges at t = 1 gives the finite limit."""
        return 2 * self.beta(t) * self.beta_dot(t)

    def sample(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``x_t = alpha z + beta eps``, a draw from p_t(x | z)."""
        check_time(t)
        check_like(z, eps, "z and eps")
        return expand_time(self.alpha(t), z) * z + expand_time(self.beta(t), eps) * eps

    def velocity(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``u = alpha_dot z + beta_dot eps``, the target of conditional flow matching at ``sample(z, eps, t)``."""
        check_time(t)
        check_like(z, eps, "z and eps")
        return expand_time(self.alpha_dot(t), z) * z + expand_time(self.beta_dot(t), eps) * eps

    def conditional_velocity(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """``u_t(x | z) = (alpha_dot - beta_dot alpha / beta) z + (beta_dot / beta) x``. Needs beta > 0, so t < 1."""
        check_time(t)
        ratio = self.beta_dot(t) / self.beta(t)
        return expand_time(self.alpha_dot(t) - ratio * self.alpha(t), z) * z + expand_time(ratio, x) * x

    def conditional_score(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """``grad log p_t(x | z) = -(x - alpha z) / beta^2``. Needs beta > 0, so t < 1."""
        check_time(t)
        return -(x - expand_time(self.alpha(t), z) * z) / expand_time(self.beta(t).square(), x)


def check_time(t: Tensor) -> None:
    """Raise a UserError for times outside [0, 1]. On an accelerator the check would stall the queue: skipped there."""
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and t.numel():
        low, high = (value.item() for value in t.detach().aminmax())  # numbers: comparing tensors takes thrice the time
        if not (low >= 0 and high <= 1):
            raise UserError(f"t must lie in [0, 1], got values from {low:g} to {high:g}")


@dataclass(frozen=True)
class CondOTPath(GaussianPath):
    """alpha = t, beta = 1 - t: straight lines from noise to data (Lipman et al. 2023; rectified flow)."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def beta(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def beta_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def velocity(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``u = z - eps``, the same at all times."""
        check_time(t)
        check_like(z, eps, "z and eps")
        expand_time(t, z)  # fails where t is not (B,)
        return z - eps

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)


@dataclass(frozen=True)
class CosinePath(GaussianPath):
    """alpha = sin(pi t / 2), beta = cos(pi t / 2): variance-preserving, without VP's singular end point."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def beta(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # cos(pi / 2) is -4e-8 in float32; this form is exactly 0 at t = 1

    def alpha_dot(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.beta(t)

    def beta_dot(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.alpha(t)

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return 1 - 2 / math.pi * torch.atan(sigma)


@dataclass(frozen=True)
class PolynomialPath(GaussianPath):
    """alpha = t^power, beta = 1 - t^power, for power >= 1.

    With power > 1 the velocity vanishes at t = 0 and says nothing about z or eps there.
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
    """The variance-preserving diffusion of DDPM (Song et al. 2021, eq. 32) on our clock: t = 1 is data.

    With s = 1 - t and a noise rate that grows linearly, ``rate(s) = rate_min + s (rate_max - rate_min)``:
    ``log alpha = -s^2 (rate_max - rate_min) / 4 - s rate_min / 2`` and ``beta = sqrt(1 - alpha^2)``. At t = 0 some data
    is left (alpha = 0.0066 with the defaults); towards t = 1 beta_dot diverges like (1 - t)^-1/2.
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
