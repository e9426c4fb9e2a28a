"""Gaussian mixtures: data whose density, velocity and score are known in closed form on every path.

For data ``z ~ sum_k w_k N(m_k, s_k^2 I)``, the marginal of the path is ``p_t = sum_k w_k N(alpha m_k, v_k I)`` with
``v_k = alpha^2 s_k^2 + beta^2``. Given x and the component k, z and eps are jointly Gaussian. So every field is a
weighted mean over components of something linear in x and m_k. The weights are the posterior probabilities r_k(x).

With Diracs (s_k = 0) at the points of a finite training set, these are the exact fields that an infinitely flexible
network would learn from that set.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.tensors import expand_time
from fmlit.flows.paths import GaussianPath, check_time

ELEMENTS = 1 << 22  # entries of the largest temporary: 32 MiB in float64


class GaussianMixture:
    """A mixture of isotropic Gaussians. ``GaussianMixture([[-2.0], [2.0]], 0.0)`` is a pair of Diracs at -2 and 2.

    The methods take x of shape (B, *shape) and t of shape (B,), on the device of the means. They compute in float64 and
    in log space, in blocks of bounded memory. They are differentiable in x and t, and return the dtype of x.

    Args:
        means: the means, (K, *shape).
        stds: the standard deviations, (K,), or one number for all components. At least 0.
        weights: the weights, (K,), which are normalized here, or None for equal weights.

    Raises:
        UserError: shapes do not match, or a parameter is negative or not finite. Methods raise it at t = 1 if the
            mixture holds a Dirac, because it has no density there.
    """

    def __init__(
        self,
        means: Tensor | Sequence,
        stds: Tensor | Sequence[float] | float,
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        means = torch.as_tensor(means)
        self.means = means if means.is_floating_point() else means.to(torch.get_default_dtype())
        if self.means.ndim < 2 or not len(self.means):
            raise UserError(f"means must have shape (K, *shape) with K >= 1, got {tuple(self.means.shape)}")
        count, device = len(self.means), self.means.device
        self.stds = torch.as_tensor(stds, dtype=torch.float64, device=device)
        self.stds = self.stds.expand(count) if self.stds.ndim == 0 else self.stds
        self.weights = torch.as_tensor(
            [1.0] * count if weights is None else weights, dtype=torch.float64, device=device
        )
        for name, values in (("stds", self.stds), ("weights", self.weights)):
            if values.shape != (count,):
                raise UserError(f"{name} must have shape ({count},), one for each mean, got {tuple(values.shape)}")
            if not (torch.isfinite(values) & (values >= 0)).all():
                raise UserError(f"{name} must be finite and at least 0, got {values.tolist()[:8]}")
        if not self.weights.sum() > 0:
            raise UserError("weights must not all be 0")
        self.weights = self.weights / self.weights.sum()
        if not torch.isfinite(self.means).all():
            raise UserError("means hold NaN or infinite values")
        # Distances are taken between centered points, so that an offset of the data costs no precision.
        points = self.means.double().flatten(1)
        self._center = self.weights @ points
        self._points = points - self._center
        self._square_norms = self._points.square().sum(1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n data points (n, *shape), on the device and in the dtype of the means."""
        device = self.means.device if generator is None else generator.device
        component = torch.multinomial(self.weights.to(device), n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.means.shape[1:], dtype=self.means.dtype, device=device, generator=generator)
        component, noise = component.to(self.means.device), noise.to(self.means)
        return self.means[component] + expand_time(self.stds[component].to(noise), noise) * noise

    def log_prob(self, x: Tensor, path: GaussianPath, t: Tensor) -> Tensor:
        """The log density ``log p_t(x)`` in nats, (B,)."""
        return self._in_blocks(lambda x, t: self._log_joint(x, path, t).logsumexp(1), x, path, t)

    def velocity(self, x: Tensor, path: GaussianPath, t: Tensor) -> Tensor:
        """The marginal velocity ``u_t(x) = E[alpha_dot z + beta_dot eps | x_t = x]``, which flow matching learns."""

        def mean(x: Tensor, t: Tensor) -> Tensor:
            alpha, alpha_dot = path.alpha(t)[:, None], path.alpha_dot(t)[:, None]
            half_rate = alpha * alpha_dot * self.stds**2 + path.variance_dot(t)[:, None] / 2
            return self._posterior_mean(x, path, t, alpha_dot, half_rate / self._variances(path, t))

        return self._in_blocks(mean, x, path, t)

    def score(self, x: Tensor, path: GaussianPath, t: Tensor) -> Tensor:
        """The marginal score ``grad log p_t(x)``."""

        def mean(x: Tensor, t: Tensor) -> Tensor:
            return self._posterior_mean(x, path, t, torch.zeros_like(t)[:, None], -1 / self._variances(path, t))

        return self._in_blocks(mean, x, path, t)

    def data(self, x: Tensor, path: GaussianPath, t: Tensor) -> Tensor:
        """The ideal denoiser ``E[z | x_t = x]``."""

        def mean(x: Tensor, t: Tensor) -> Tensor:
            gain = path.alpha(t)[:, None] * self.stds**2 / self._variances(path, t)
            return self._posterior_mean(x, path, t, torch.ones_like(t)[:, None], gain)

        return self._in_blocks(mean, x, path, t)

    def _posterior_mean(self, x: Tensor, path: GaussianPath, t: Tensor, slope: Tensor, gain: Tensor) -> Tensor:
        """sum_k r_k (slope m_k + gain_k (x - alpha m_k)) for flat x (B, d), slope (B, 1) and gain (B, K)."""
        posterior = self._log_joint(x, path, t).softmax(1)
        alpha = path.alpha(t)[:, None]
        centered = x - alpha * self._center
        mixed = (posterior * (slope - gain * alpha)) @ self._points
        return slope * self._center + (posterior * gain).sum(1, keepdim=True) * centered + mixed

    def _log_joint(self, x: Tensor, path: GaussianPath, t: Tensor) -> Tensor:
        """log w_k N(x; alpha m_k, v_k I), (B, K), for flat x."""
        alpha, variances = path.alpha(t)[:, None], self._variances(path, t)
        centered = x - alpha * self._center
        if x.numel() * len(self._points) <= ELEMENTS:
            distances = (centered[:, None] - alpha[:, None] * self._points).square().sum(2)
        else:  # a matrix product instead of (B, K, d) differences; loses digits only where beta^2 << 1e-10 |x|^2
            products = centered @ self._points.T
            distances = centered.square().sum(1, keepdim=True) - 2 * alpha * products + alpha**2 * self._square_norms
        log_normal = -(distances / variances + x.shape[1] * (2 * math.pi * variances).log()) / 2
        return self.weights.log() + log_normal

    def _variances(self, path: GaussianPath, t: Tensor) -> Tensor:
        """v_k, (B, K)."""
        return (path.alpha(t)[:, None] * self.stds) ** 2 + path.beta(t)[:, None] ** 2

    def _in_blocks(
        self, function: Callable[[Tensor, Tensor], Tensor], x: Tensor, path: GaussianPath, t: Tensor
    ) -> Tensor:
        """``function`` of flat float64 x and t, over blocks of samples; (B, d) results come back in the shape of x."""
        if x.shape[1:] != self.means.shape[1:]:
            raise UserError(f"x must have shape (B, {', '.join(map(str, self.means.shape[1:]))}), got {tuple(x.shape)}")
        expand_time(t, x)  # raises unless t is (B,)
        check_time(t)
        flat, time = x.double().flatten(1), t.double()
        if (self.stds == 0).any() and (path.beta(time) == 0).any():
            raise UserError("a mixture with a zero standard deviation has no density at t = 1: end before it")
        rows = max(1, ELEMENTS // len(self.means))
        blocks = [function(*block) for block in zip(flat.split(rows), time.split(rows), strict=True)]
        result = torch.cat(blocks).to(x.dtype)
        return result if result.ndim == 1 else result.reshape(x.shape)
