"""The differential equations that samplers solve, as functions ``(x, t) -> like x``.

A Gaussian path with marginal velocity u and score s is followed, in distribution, by the ODE ``dX = u dt`` and by a
whole family of SDEs (Song et al. 2021; Albergo et al. 2023)::

    dX = [u + sigma_t^2 / 2 s] dt + sigma_t dW        for any sigma_t >= 0

In the Fokker-Planck equation the terms of noise and score cancel, so every choice has the same marginals p_t. They
differ in how strongly a sample is stirred on its way, which costs steps and forgives errors of the network.
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
        """sigma_t, (B,) for t of shape (B,)."""

    def along(self, path: GaussianPath, times: Tensor | None = None) -> Field:
        """The coefficient as the SDE solvers take it: (x, t) -> (B, 1, ..., 1).

        With the times of a solver it is lowered where their steps could not follow it. Near data the score pulls noise
        in at the rate ``sigma_t^2 / (2 beta_t^2)``; a step h times that rate above 2 throws it out further than it was,
        over and over. So sigma_t is at most ``beta_t sqrt(2 / h)``, where one step takes the noise out just once. Any
        coefficient has the same marginals, and so has this one.

        Raises:
            UserError: sigma_t < 0 (when called on the CPU; elsewhere the check would stall the queue).
        """
        if times is not None:
            steps = times.diff()
            longest = torch.maximum(torch.cat([steps[:1], steps]), torch.cat([steps, steps[-1:]]))  # that touch a time
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
    """sigma_t = value, up to where the noise of the path is so little that steps cannot follow (see ``along``)."""

    value: float = 1.0

    def __post_init__(self) -> None:
        _check_not_negative("ConstantDiffusion.value", self.value)

    def __call__(self, path: GaussianPath, t: Tensor) -> Tensor:
        return torch.full_like(t, self.value)


@dataclass(frozen=True)
class BetaDiffusion(Diffusion):
    """sigma_t = scale beta_t: the noise dies out with the path's, and ``sigma_t^2 / 2 s = -scale^2 beta eps / 2`` stays
    finite up to t = 1."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_not_negative("BetaDiffusion.scale", self.scale)

    def __call__(self, path: GaussianPath, t: Tensor) -> Tensor:
        return self.scale * path.beta(t)


@dataclass(frozen=True)
class ReverseDiffusion(Diffusion):
    """``sigma_t^2 = scale^2 2 beta W / alpha`` with ``W = alpha_dot beta - alpha beta_dot``; infinite where alpha = 0.

    At scale 1 this is Anderson's time reversal of the linear forward diffusion that has these marginals (Anderson 1982;
    Song et al. 2021, eq. 6). On the VP path it is the SDE that DDPM discretises, with sigma_t^2 = rate.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_not_negative("ReverseDiffusion.scale", self.scale)

    def __call__(self, path: GaussianPath, t: Tensor) -> Tensor:
        # 2 beta W / alpha, with beta beta_dot as one finite quantity where beta_dot alone diverges
        variance = 2 * path.beta(t) ** 2 * path.alpha_dot(t) / path.alpha(t) - path.variance_dot(t)
        return self.scale * variance.sqrt()


def _check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UserError(f"{name} must be finite and not negative, got {value}")


def sde_drift(velocity: Field, score: Field, diffusion: Field) -> Field:
    """``u + sigma_t^2 / 2 s``: the drift with which noise sigma_t leaves the marginals of the ODE unchanged.

    ``diffusion`` must not depend on x (use ``Diffusion.along(path)``): a multiplicative one would add its divergence.
    """

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return velocity(x, t) + diffusion(x, t) ** 2 / 2 * score(x, t)

    return drift


def ode_drift(drift: Field, score: Field, diffusion: Field) -> Field:
    """``drift - sigma_t^2 / 2 s``: the probability-flow ODE of an SDE (Song et al. 2021, eq. 13). Undoes ``sde_drift``.

    ``diffusion`` must not depend on x.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return drift(x, t) - diffusion(x, t) ** 2 / 2 * score(x, t)

    return velocity


def brownian_motion(sigma: float = 1.0) -> tuple[Field, Field]:
    """(drift, diffusion) of ``dX = sigma dW``: X_t ~ N(x0, sigma^2 t)."""
    return ornstein_uhlenbeck(0.0, sigma)


def ornstein_uhlenbeck(theta: float, sigma: float) -> tuple[Field, Field]:
    """(drift, diffusion) of the linear SDE ``dX = -theta X dt + sigma dW``.

    X_t ~ N(x0 e^(-theta t), sigma^2 (1 - e^(-2 theta t)) / (2 theta)); with sigma = 0 the linear ODE x0 e^(-theta t).
    """
    _check_not_negative("sigma", sigma)
    return lambda x, t: -theta * x, lambda x, t: torch.full_like(expand_time(t, x), sigma)
