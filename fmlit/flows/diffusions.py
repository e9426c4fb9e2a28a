"""The stochastic differential equations that samplers solve: drifts and diffusion coefficients.

Let u be the marginal velocity of a Gaussian path and s its score. The ODE ``dX = u dt`` has the marginals p_t of the
path. So does a whole family of SDEs (Song et al. 2021; Albergo et al. 2023)::

    dX = [u + sigma_t^2 / 2 s] dt + sigma_t dW        for any sigma_t >= 0

In the Fokker-Planck equation, the terms of the noise and of the score cancel, so every choice of sigma_t has the same
marginals. A larger sigma_t needs more steps, and corrects more of the network's errors.

References:
    Anderson 1982, "Reverse-time diffusion equation models", https://doi.org/10.1016/0304-4149(82)90051-5
    Song et al. 2021, "Score-Based Generative Modeling through SDEs", https://arxiv.org/abs/2011.13456
    Albergo et al. 2023, "Stochastic Interpolants", https://arxiv.org/abs/2303.08797
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.tensors import Field, expand_time
from fmlit.flows.paths import GaussianPath


class Diffusion(ABC):
    """The diffusion coefficient sigma_t >= 0 of a sampling SDE, as a function of the path and of time."""

    @abstractmethod
    def __call__(self, path: GaussianPath, t: Tensor) -> Tensor:
        """Return sigma_t of shape (B,) for t of shape (B,)."""

    def along(self, path: GaussianPath, times: Tensor | None = None) -> Field:
        """The coefficient in the form that SDE solvers take: (x, t) -> (B, 1, ..., 1).

        If the times of the solver are given, the coefficient is lowered where their steps are too long for it. Near the
        data, the score removes noise at the rate ``sigma_t^2 / (2 beta_t^2)``. If a step h times that rate is above 2,
        Euler's method is unstable. So sigma_t is limited to ``beta_t sqrt(2 / h)``, at which one step removes the noise
        exactly once. This does not change the marginals, because every coefficient has the same ones.

        Raises:
            UserError: sigma_t is negative. GPUs skip this check, because it would stall their queue.
        """
        if times is not None:
            steps = times.diff()
            longest = torch.maximum(torch.cat([steps[:1], steps]), torch.cat([steps, steps[-1:]]))  # at each time
            most = path.beta(times) * (2 / longest).sqrt()

        def diffusion(x: Tensor, t: Tensor) -> Tensor:
            sigma = self(path, t)
            if times is not None:
                sigma = sigma.minimum(most[(t[:, None] - times).abs().argmin(1)])
            if sigma.device.type == "cpu" and not torch.compiler.is_compiling() and (sigma < 0).any():
                raise UserError(f"sigma_t must not be negative, got {sigma.min().item():g} from {self}")
            return expand_time(sigma, x)

        return diffusion


@dataclass(frozen=True)
class ConstantDiffusion(Diffusion):
    """``sigma_t = value``, lowered near the data where the steps would be too long for it (see ``along``)."""

    value: float = 1.0

    def __post_init__(self) -> None:
        _check_not_negative("ConstantDiffusion.value", self.value)

    def __call__(self, path: GaussianPath, t: Tensor) -> Tensor:
        return torch.full_like(t, self.value)


@dataclass(frozen=True)
class BetaDiffusion(Diffusion):
    """``sigma_t = scale beta_t``: it vanishes together with the noise of the path.

    The term ``sigma_t^2 / 2 s = -scale^2 beta eps / 2`` stays finite up to t = 1.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_not_negative("BetaDiffusion.scale", self.scale)

    def __call__(self, path: GaussianPath, t: Tensor) -> Tensor:
        return self.scale * path.beta(t)


@dataclass(frozen=True)
class ReverseDiffusion(Diffusion):
    """``sigma_t^2 = scale^2 2 beta W / alpha`` with ``W = alpha_dot beta - alpha beta_dot``. Infinite where alpha = 0.

    At scale 1 this is Anderson's time reversal of the linear forward diffusion with the same marginals (Anderson 1982;
    Song et al. 2021, equation 6). On the VP path it is the SDE that DDPM discretizes, with ``sigma_t^2 = rate``.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_not_negative("ReverseDiffusion.scale", self.scale)

    def __call__(self, path: GaussianPath, t: Tensor) -> Tensor:
        # 2 beta W / alpha. variance_dot stays finite where beta_dot alone diverges.
        variance = 2 * path.beta(t) ** 2 * path.alpha_dot(t) / path.alpha(t) - path.variance_dot(t)
        return self.scale * variance.sqrt()


def _check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UserError(f"{name} must be finite and not negative, got {value}")


def sde_drift(velocity: Field, score: Field, diffusion: Field) -> Field:
    """``u + sigma_t^2 / 2 s``: the drift of the SDE that has the same marginals as the ODE of ``velocity``.

    ``diffusion`` must not depend on x, or its divergence would have to be added. ``Diffusion.along(path)`` does not.
    """

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return velocity(x, t) + diffusion(x, t) ** 2 / 2 * score(x, t)

    return drift


def ode_drift(drift: Field, score: Field, diffusion: Field) -> Field:
    """``drift - sigma_t^2 / 2 s``: the probability-flow ODE of an SDE. It is the inverse of ``sde_drift``.

    ``diffusion`` must not depend on x. Source: Song et al. 2021, equation 13.
    """

    return sde_drift(drift, lambda x, t: -score(x, t), diffusion)


def brownian_motion(sigma: float = 1.0) -> tuple[Field, Field]:
    """The pair (drift, diffusion) of ``dX = sigma dW``, for which X_t ~ N(x0, sigma^2 t)."""
    return ornstein_uhlenbeck(0.0, sigma)


def ornstein_uhlenbeck(theta: float, sigma: float) -> tuple[Field, Field]:
    """The pair (drift, diffusion) of the linear SDE ``dX = -theta X dt + sigma dW``.

    X_t ~ N(x0 e^(-theta t), sigma^2 (1 - e^(-2 theta t)) / (2 theta)). With sigma = 0 it is the linear ODE, and
    X_t = x0 e^(-theta t).
    """
    _check_not_negative("sigma", sigma)
    return lambda x, t: -theta * x, lambda x, t: torch.full_like(expand_time(t, x), sigma)
