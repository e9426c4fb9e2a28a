"""What a network may predict, and how each prediction is converted into any other.

At a point x on the path at time t, every prediction is one linear equation for the pair (z, eps). Together with
``x = alpha z + beta eps`` it forms a 2x2 system. Its solution gives z and eps, and these give the velocity and the
score. With ``W = alpha_dot beta - alpha beta_dot``::

    z = (beta u - beta_dot x) / W        eps = (alpha_dot x - alpha u) / W        score = -eps / beta

The system is singular in three cases, and ``times.py`` keeps training and sampling away from them. A velocity cannot
be converted where W = 0. Noise or score cannot be converted to data where alpha = 0. Where beta = 0, data cannot be
converted to noise, and nothing can be converted to the score.

**The training loss** is a regression on the prediction itself, ``w(t) |F - target|^2``. Where an error of F changes the
velocity g times as much, the flow matching loss ``|u_theta - u|^2`` is this regression with ``w = g^2``. For a network
that predicts noise or data, g grows to infinity at one end of the clock, and a few times would dominate all others. So
g is clipped at ``MAX_GAIN``. Score matching is the same with the gain of the noise, because
``beta^2 |s_theta - s|^2`` is ``|eps_theta - eps|^2``.

References:
    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239
    Song & Ermon 2019, "Generative Modeling by Estimating Gradients", https://arxiv.org/abs/1907.05600
    Karras et al. 2022, "Elucidating the Design Space of Diffusion Models" (EDM), https://arxiv.org/abs/2206.00364
    Li & He 2025, "Back to Basics: Let Denoising Generative Models Denoise" (JiT), https://arxiv.org/abs/2511.13720
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.tensors import expand_time
from fmlit.flows.paths import GaussianPath

MAX_GAIN = 5.0  # JiT clips 1 - t at 0.05, which is 20 on straight paths; 5 learns faster and is as exact in the end


class Gains(NamedTuple):
    """How many times larger an error of the network's output becomes in other quantities, (B,) each."""

    velocity: Tensor
    noise: Tensor


class Prediction(ABC):
    """The meaning of a network's output ``F(x, t)``. Each subclass is one meaning.

    ``data_and_noise`` solves the 2x2 system, and the four fields below follow from it. A subclass overrides the field
    that it predicts itself. That field is then exact at all times, including the end points. Points and outputs have
    shape (B, *shape), and t has shape (B,).
    """

    @abstractmethod
    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The value whose conditional mean F predicts at ``path.sample(z, eps, t)``."""

    @abstractmethod
    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The pair (z, eps) that the output implies at x."""

    def network_input(self, path: GaussianPath, x: Tensor, t: Tensor) -> Tensor:
        """The input of the network at x."""
        return x

    @abstractmethod
    def gains(self, path: GaussianPath, t: Tensor) -> Gains:
        """``|du/dF|`` and ``|d eps/dF|`` at a fixed x."""

    def flow_matching_weight(self, path: GaussianPath, t: Tensor) -> Tensor:
        """w(t), (B,), for which ``w |F - target|^2`` is the flow matching loss, with its gain clipped."""
        return self.gains(path, t).velocity.clamp(max=MAX_GAIN).square()

    def score_matching_weight(self, path: GaussianPath, t: Tensor, weighted: bool = True) -> Tensor:
        """w(t), (B,), for which ``w |F - target|^2`` is the denoising score matching loss.

        ``weighted`` is that loss with its factor beta^2, and with its gain clipped. Without the factor, nothing is
        clipped: ``|s_theta - s|^2`` is ``|eps_theta - eps|^2 / beta^2``.
        """
        noise = self.gains(path, t).noise
        return noise.clamp(max=MAX_GAIN).square() if weighted else (noise / path.beta(t)).square()

    def velocity(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        z, eps = self.data_and_noise(path, output, x, t)
        return path.velocity(z, eps, t)

    def score(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return -self.noise(path, output, x, t) / expand_time(path.beta(t), x)

    def noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.data_and_noise(path, output, x, t)[1]

    def data(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.data_and_noise(path, output, x, t)[0]


@dataclass(frozen=True)
class Velocity(Prediction):
    """F predicts the velocity ``u = alpha_dot z + beta_dot eps``, as in flow matching."""

    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return path.velocity(z, eps, t)

    def gains(self, path: GaussianPath, t: Tensor) -> Gains:
        return Gains(torch.ones_like(t), path.alpha(t) / determinant(path, t))

    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = expand_time(path.alpha(t), x), expand_time(path.beta(t), x)
        alpha_dot, beta_dot = expand_time(path.alpha_dot(t), x), expand_time(path.beta_dot(t), x)
        w = alpha_dot * beta - alpha * beta_dot
        return (beta * output - beta_dot * x) / w, (alpha_dot * x - alpha * output) / w

    def velocity(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class Noise(Prediction):
    """F predicts the noise ``eps``, as in DDPM (Ho et al. 2020)."""

    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps

    def gains(self, path: GaussianPath, t: Tensor) -> Gains:
        return Gains(determinant(path, t) / path.alpha(t), torch.ones_like(t))

    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return (x - expand_time(path.beta(t), x) * output) / expand_time(path.alpha(t), x), output

    def noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class Data(Prediction):
    """F predicts the data point ``z``. The network is a denoiser."""

    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return z

    def gains(self, path: GaussianPath, t: Tensor) -> Gains:
        return Gains(determinant(path, t) / path.beta(t), path.alpha(t) / path.beta(t))

    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return output, (x - expand_time(path.alpha(t), x) * output) / expand_time(path.beta(t), x)

    def data(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class Score(Prediction):
    """F predicts the score ``grad log p_t(x)`` (Song & Ermon 2019)."""

    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return -eps / expand_time(path.beta(t), eps)

    def gains(self, path: GaussianPath, t: Tensor) -> Gains:
        return Gains(determinant(path, t) * path.beta(t) / path.alpha(t), path.beta(t))

    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        eps = -expand_time(path.beta(t), x) * output
        return Noise().data_and_noise(path, eps, x, t)

    def score(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class PreconditionedVelocity(Prediction):
    """F predicts what x does not tell about the velocity, scaled to unit variance: EDM's preconditioning.

    For data of standard deviation ``sd``, with ``var = alpha^2 sd^2 + beta^2``::

        u = k x + s F(x / sqrt(var), t),   k = (alpha alpha_dot sd^2 + beta beta_dot) / var,   s = sd |W| / sqrt(var)

    Here ``k x`` is the best linear guess of u, and ``s`` is the standard deviation of the rest. The network F is the
    same as in Karras et al. 2022, section 5; only the notation is that of velocities.

    Args:
        data_std: standard deviation of the data, over all dimensions. Images in [-1, 1] have about 0.5.
    """

    data_std: float = 0.5

    def __post_init__(self) -> None:
        if not self.data_std > 0:
            raise UserError(f"PreconditionedVelocity.data_std must be positive, got {self.data_std}")

    def coefficients(self, path: GaussianPath, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The coefficients (k, s, var), each of shape (B,)."""
        alpha, beta, alpha_dot, beta_dot = path.alpha(t), path.beta(t), path.alpha_dot(t), path.beta_dot(t)
        variance = (alpha * self.data_std) ** 2 + beta**2
        k = (alpha * alpha_dot * self.data_std**2 + beta * beta_dot) / variance
        s = self.data_std * determinant(path, t) / variance.sqrt()
        return k, s, variance

    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        k, s, _ = self.coefficients(path, t)
        return (path.velocity(z, eps, t) - expand_time(k, z) * path.sample(z, eps, t)) / expand_time(s, z)

    def network_input(self, path: GaussianPath, x: Tensor, t: Tensor) -> Tensor:
        return x / expand_time(self.coefficients(path, t)[2].sqrt(), x)

    def gains(self, path: GaussianPath, t: Tensor) -> Gains:
        _, s, variance = self.coefficients(path, t)
        return Gains(s, self.data_std * path.alpha(t) / variance.sqrt())

    def flow_matching_weight(self, path: GaussianPath, t: Tensor) -> Tensor:
        """1, because the target has unit variance at every time."""
        return torch.ones_like(t)

    def velocity(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        k, s, _ = self.coefficients(path, t)
        return expand_time(k, x) * x + expand_time(s, x) * output

    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return Velocity().data_and_noise(path, self.velocity(path, output, x, t), x, t)


def determinant(path: GaussianPath, t: Tensor) -> Tensor:
    """``|W| = |alpha_dot beta - alpha beta_dot|``, (B,)."""
    return (path.alpha_dot(t) * path.beta(t) - path.alpha(t) * path.beta_dot(t)).abs()
