"""What a network may predict, and the one hub through which each prediction becomes any other.

Given a point x on the path at time t, a prediction is one linear equation in the pair (z, eps). Together with
``x = alpha z + beta eps`` that is a 2x2 system; solving it gives z and eps, and from these the velocity and the score
follow. With W = alpha_dot beta - alpha beta_dot::

    z = (beta u - beta_dot x) / W        eps = (alpha_dot x - alpha u) / W        score = -eps / beta

Where the system is singular (see ``times.py``, which keeps samplers and training away from there): velocity where
W = 0; noise or score to data at alpha = 0; data to noise, and anything to score, at beta = 0.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.tensors import expand_time
from fmlit.flows.paths import GaussianPath


class Prediction(ABC):
    """The meaning of a network's output F(x, t), as a subclass.

    ``data_and_noise`` is the hub; the four fields below come out of it. A subclass overrides the field that it
    predicts itself, which is then exact everywhere, end points included. All shapes (B, *shape), t is (B,).
    """

    @abstractmethod
    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The value that F should take in the mean at ``path.sample(z, eps, t)``."""

    @abstractmethod
    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(z, eps) implied by the output at x."""

    def network_input(self, path: GaussianPath, x: Tensor, t: Tensor) -> Tensor:
        """What the network is shown instead of x."""
        return x

    def loss_weight(self, path: GaussianPath, t: Tensor) -> Tensor | None:
        """(B,) factor on the velocity loss that makes it a unit-variance regression; None for 1."""
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
    """F predicts u = alpha_dot z + beta_dot eps, the marginal velocity in the mean: flow matching's own."""

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
    """F predicts eps: the noise predictor of DDPM (Ho et al. 2020)."""

    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps

    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return (x - expand_time(path.beta(t), x) * output) / expand_time(path.alpha(t), x), output

    def noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class Data(Prediction):
    """F predicts z: a denoiser."""

    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return z

    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return output, (x - expand_time(path.alpha(t), x) * output) / expand_time(path.beta(t), x)

    def data(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class Score(Prediction):
    """F predicts grad log p_t(x): a score network (Song & Ermon 2019)."""

    def target(self, path: GaussianPath, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return -eps / expand_time(path.beta(t), eps)

    def data_and_noise(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        eps = -expand_time(path.beta(t), x) * output
        return Noise().data_and_noise(path, eps, x, t)

    def score(self, path: GaussianPath, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class PreconditionedVelocity(Prediction):
    """F predicts the part of the velocity that x does not tell already, scaled to unit variance: EDM's preconditioning.

    For data of standard deviation sd, with ``var = alpha^2 sd^2 + beta^2``::

        u = k x + s F(x / sqrt(var), t),   k = (alpha alpha_dot sd^2 + beta beta_dot) / var,   s = sd |W| / sqrt(var)

    k x is the best linear guess of u, and s the standard deviation of what is left (Karras et al. 2022, section 5,
    carried over to velocities; identical to their F).
    """

    data_std: float = 0.5

    def __post_init__(self) -> None:
        if not self.data_std > 0:
            raise UserError(f"PreconditionedVelocity.data_std must be positive, got {self.data_std}")

    def coefficients(self, path: GaussianPath, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(k, s, var), each (B,)."""
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
