"""What a network may predict, and how each prediction is converted into any other.

At a point x on the path at time t, every prediction is one linear equation for the pair (z, eps). Together with
``x = alpha z + beta eps`` it forms a 2x2 system. Its solution gives z and eps, and these give the velocity and the
score. With ``W = alpha_dot beta - alpha beta_dot``::

    z = (beta u - beta_dot x) / W        eps = (alpha_dot x - alpha u) / W        score = -eps / beta

The system is singular in three cases, and ``times.py`` keeps training and sampling away from them. A velocity cannot
be converted where W = 0. Noise or score cannot be converted to data where alpha = 0. Where beta = 0, data cannot be
converted to noise, and nothing can be converted to the score.

References:
    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239
    Song & Ermon 2019, "Generative Modeling by Estimating Gradients", https://arxiv.org/abs/1907.05600
    Karras et al. 2022, "Elucidating the Design Space of Diffusion Models" (EDM), https://arxiv.org/abs/2206.00364
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.tensors import expand_time
from fmlit.flows.paths import GaussianPath


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

    def loss_weight(self, path: GaussianPath, t: Tensor) -> Tensor | None:
        """The factor (B,) that turns the velocity loss into a regression with a unit-variance target, or None for 1."""
        return None

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

    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = expand_time(path.alpha(t), x), expand_time(path.beta(t), x)
        alpha_dot, beta_dot = expand_time(path.alpha_dot(t), x), expand_time(path.beta_dot(t), x)
        determinant = alpha_dot * beta - alpha * beta_dot
        return (beta * output - beta_dot * x) / determinant, (alpha_dot * x - alpha * output) / determinant

    def velocity(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class Noise(Prediction):
    """F predicts the noise ``eps``, as in DDPM (Ho et al. 2020)."""

    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps

    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return (x - expand_time(path.beta(t), x) * output) / expand_time(path.alpha(t), x), output

    def noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class Data(Prediction):
    """F predicts the data point ``z``. The network is a denoiser."""

    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return z

    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return output, (x - expand_time(path.alpha(t), x) * output) / expand_time(path.beta(t), x)

    def data(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class Score(Prediction):
    """F predicts the score ``grad log p_t(x)`` (Song & Ermon 2019)."""

    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return -eps / expand_time(path.beta(t), eps)

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
        s = self.data_std * (alpha_dot * beta - alpha * beta_dot).abs() / variance.sqrt()
        return k, s, variance

    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        k, s, _ = self.coefficients(path, t)
        return (path.velocity(z, eps, t) - expand_time(k, z) * path.sample(z, eps, t)) / expand_time(s, z)

    def network_input(self, path: GaussianPath, x: Tensor, t: Tensor) -> Tensor:
        return x / expand_time(self.coefficients(path, t)[2].sqrt(), x)

    def loss_weight(self, path: GaussianPath, t: Tensor) -> Tensor | None:
        return self.coefficients(path, t)[1].square().reciprocal()

    def velocity(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        k, s, _ = self.coefficients(path, t)
        return expand_time(k, x) * x + expand_time(s, x) * output

    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return Velocity().data_and_noise(path, self.velocity(path, output, x, t), x, t)
