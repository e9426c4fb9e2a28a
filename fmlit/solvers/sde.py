"""Solvers of Ito SDEs ``dX = drift(X, t) dt + diffusion(X, t) dW`` with diagonal noise, and EDM's churn sampler.

The contract of ``ode.py`` holds. Besides:

* ``diffusion(x, t)`` returns a number, or a tensor with as many dimensions as x that broadcasts to it (a (B,) tensor is
  refused: it would be spread along the last axis whenever B equals the width).
* Step i takes its standard normal from ``noise(i, like)``, in the shape of ``like``, so that step sizes can share a
  Brownian path, and images can own their noise. Without it, torch draws, from ``generator`` if given.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.tensors import Field
from fmlit.flows.paths import GaussianPath
from fmlit.solvers.exponential import data_and_noise, noise_levels
from fmlit.solvers.ode import batch_time, evaluate, integrate

NoiseSource = Callable[[int, Tensor], Tensor]


def euler_maruyama(
    drift: Field,
    diffusion: Field,
    x0: Tensor,
    times: Tensor,
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
) -> Tensor:
    """Euler-Maruyama: ``x + h drift + sqrt(h) diffusion xi``. Converges to the Ito solution.

    Strong order 1/2, or 1 where the diffusion does not depend on x; weak order 1 (Kloeden & Platen 1992, 10.2, 14.1).
    """
    draw = _noise_source(noise, generator)

    def step(n: int, x: Tensor, t: float, t_next: float) -> Tensor:
        h = t_next - t
        return x + h * evaluate(drift, x, t) + h**0.5 * _coefficient(diffusion, x, t) * draw(n, x)

    return integrate(step, x0, times, trajectory)


def stochastic_heun(
    drift: Field,
    diffusion: Field,
    x0: Tensor,
    times: Tensor,
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
) -> Tensor:
    """Heun's method for the drift, with the diffusion averaged over the step's two times at the old x.

    Converges to the Ito solution for any diffusion (Heun's method applied to the noise as well would converge to
    Stratonovich's). Where the diffusion does not depend on x: strong order 1, weak order 2 (Kloeden & Platen 1992,
    15.1); otherwise 1/2 and 1. Two drift evaluations per step, the last one at ``times[-1]``, where drift and diffusion
    must be finite.
    """
    draw = _noise_source(noise, generator)

    def step(n: int, x: Tensor, t: float, t_next: float) -> Tensor:
        h = t_next - t
        kick = h**0.5 / 2 * (_coefficient(diffusion, x, t) + _coefficient(diffusion, x, t_next)) * draw(n, x)
        k1 = evaluate(drift, x, t)
        k2 = evaluate(drift, x + h * k1 + kick, t_next)
        return x + h / 2 * (k1 + k2) + kick

    return integrate(step, x0, times, trajectory)


def churn(
    field: Field,
    x0: Tensor,
    times: Tensor,
    path: GaussianPath,
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
    steps: int | None = None,
    *,
    s_churn: float = 40.0,
    s_min: float = 0.05,
    s_max: float = 50.0,
    s_noise: float = 1.003,
) -> Tensor:
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2) on any path, for y = x / alpha, sigma = beta / alpha.

    Where s_min <= sigma <= s_max a step first adds noise, up to sigma (1 + gamma) with
    ``gamma = min(s_churn / N, sqrt(2) - 1)`` and N = ``steps``, by default len(times) - 1, but not above the path's
    first sigma. Then it takes a Heun step in sigma: two evaluations, or one if it ends at t = 1. With s_churn = 0 the
    sampler is deterministic. ``field`` is the velocity; times as in ``exponential.py``. The defaults are EDM's for
    ImageNet-64 (table 5).
    """
    check_churn(s_churn, s_min, s_max, s_noise)
    draw = _noise_source(noise, generator)
    alphas, sigmas = noise_levels(path, times)
    largest = path.sigma(torch.zeros(1, dtype=torch.float64)).item()
    gamma = min(s_churn / (steps or len(sigmas) - 1), math.sqrt(2) - 1)

    def step(n: int, x: Tensor, t: float, t_next: float) -> Tensor:
        y, sigma, alpha, sigma_next, alpha_next = x / alphas[n], sigmas[n], alphas[n], sigmas[n + 1], alphas[n + 1]
        raised = min(sigma * (1 + gamma), largest) if s_min <= sigma <= s_max else sigma
        if raised > sigma:
            y = y + s_noise * math.sqrt(raised**2 - sigma**2) * draw(n, x)
            time = path.time_of_sigma(torch.tensor([raised], dtype=torch.float64))
            sigma, t, alpha = raised, time.item(), path.alpha(time).item()
        _, slope = data_and_noise(field, path, alpha * y, t)
        y_next = y + (sigma_next - sigma) * slope
        if sigma_next > 0:
            _, slope_next = data_and_noise(field, path, alpha_next * y_next, t_next)
            y_next = y + (sigma_next - sigma) / 2 * (slope + slope_next)
        return alpha_next * y_next

    return integrate(step, x0, times, trajectory)


def check_churn(s_churn: float, s_min: float, s_max: float, s_noise: float) -> None:
    """Raise a UserError that names what ``churn`` would refuse."""
    for name, value in (("s_churn", s_churn), ("s_min", s_min), ("s_noise", s_noise)):
        if not value >= 0:
            raise UserError(f"{name} must not be negative, got {value}")
    if not s_max >= s_min:
        raise UserError(f"churn needs s_min <= s_max, got {s_min} and {s_max}")


def _noise_source(noise: NoiseSource | None, generator: torch.Generator | None) -> NoiseSource:
    """``noise`` with its shape checked, or fresh draws from the generator (on its own device, then moved to x's)."""
    if noise is not None and generator is not None:
        raise UserError("give either noise or generator, not both")

    def draw(i: int, like: Tensor) -> Tensor:
        if noise is None:
            device = like.device if generator is None else generator.device
            return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)
        xi = noise(i, like)
        if xi.shape != like.shape:
            raise UserError(f"noise({i}, x) must have the shape {tuple(like.shape)} of x, got {tuple(xi.shape)}")
        return xi.to(like)

    return draw


def _coefficient(diffusion: Field, x: Tensor, time: float) -> Tensor:
    """``diffusion(x, t)`` with ``time`` expanded to (B,) and its shape checked."""
    g = torch.as_tensor(diffusion(x, batch_time(time, x)), dtype=x.dtype)
    fits = g.ndim == x.ndim and all(a in (1, b) for a, b in zip(g.shape, x.shape, strict=True))
    if g.ndim and not fits:
        raise UserError(
            f"diffusion must be a number or broadcast to x of shape {tuple(x.shape)} with as many dimensions, got "
            f"{tuple(g.shape)}: expand a (B,) coefficient with fmlit.core.tensors.expand_time(sigma, x)"
        )
    return g
