"""Few-step solvers of the probability-flow ODE on a Gaussian path: one evaluation per step, and memory of past ones.

With ``y = x / alpha`` and the noise level ``sigma = beta / alpha`` every path's ODE is the same, ``dy/dsigma = eps``,
and in ``lambda = -log sigma`` it is linear with the data estimate z as its source, ``dy/dlambda = z - y``, so that over
a step h of lambda (Lu et al. 2022b, proposition 4.1)::

    y(lambda + h) = e^-h y(lambda) + integral_0^h e^(s-h) z(lambda + s) ds

The solvers differ in how they continue z (or eps) from its past values. The contract of ``ode.py`` holds; ``field`` is
the velocity. Times lie in [0, 1] and start where alpha > 0, with x0 there (noise scaled by beta(times[0])). Where they
end at exactly t = 1, sigma is 0 and lambda infinite: the last step is then the first-order one, x = z, without an
evaluation at 1. Orders hold for grids that are smooth in lambda and end below 1. The first steps use lower orders for
want of a past; what that costs vanishes where sigma(times[0]) is far above the data's scale, and z hardly changes.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.tensors import Field
from fmlit.flows.paths import GaussianPath
from fmlit.flows.predictions import Velocity
from fmlit.solvers.ode import batch_time, check_times, evaluate, integrate


class Estimate(NamedTuple):
    """z and eps as the field sees them at one noise level."""

    sigma: float
    data: Tensor
    noise: Tensor


Update = Callable[[Tensor, float, Sequence[Estimate]], Tensor]  # (y, next sigma, estimates, newest first) -> next y


def ddim(field: Field, x0: Tensor, times: Tensor, path: GaussianPath, trajectory: bool = False) -> Tensor:
    """DDIM (Song et al. 2020), z held constant over a step; the same as Euler's method in sigma. Order 1."""

    def update(y: Tensor, sigma: float, past: Sequence[Estimate]) -> Tensor:
        return _relax(y, past[0].data, sigma / past[0].sigma)

    return _multistep(update, 1, field, x0, times, path, trajectory)


def dpmpp_2m(field: Field, x0: Tensor, times: Tensor, path: GaussianPath, trajectory: bool = False) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): z extrapolated to the middle of the step. Order 2."""
    return _multistep(_update_2m, 2, field, x0, times, path, trajectory)


def dpmpp_3m(
    field: Field, x0: Tensor, times: Tensor, path: GaussianPath, trajectory: bool = False, *, corrected: bool = False
) -> Tensor:
    """DPM-Solver++(3M), from the code published with Lu et al. 2022b: z continued as a parabola in lambda.

    As published the curvature enters with half of its weight (the difference D2 is h^2 z'' / 2, and is used as if it
    were h^2 z''), which leaves order 2. ``corrected=True`` gives it the full weight: order 3.
    """

    def update(y: Tensor, sigma: float, past: Sequence[Estimate]) -> Tensor:
        if len(past) < 3:
            return _update_2m(y, sigma, past)
        (s0, z0, _), (s1, z1, _), (s2, z2, _) = past
        h = math.log(s0 / sigma)
        r0, r1 = math.log(s1 / s0) / h, math.log(s2 / s1) / h
        slope0, slope1 = (z0 - z1) / r0, (z1 - z2) / r1
        curvature = (slope0 - slope1) / (r0 + r1)
        _, first, second = _exponential_moments(h, 3)
        weight = second if corrected else second / 2
        return _relax(y, z0, sigma / s0) + first * (slope0 + r0 * curvature) + weight * curvature

    return _multistep(update, 3, field, x0, times, path, trajectory)


def ipndm(
    field: Field,
    x0: Tensor,
    times: Tensor,
    path: GaussianPath,
    trajectory: bool = False,
    *,
    variable_step: bool = False,
) -> Tensor:
    """iPNDM with four values (Zhang & Chen 2023): Adams-Bashforth for ``dy/dsigma = eps``, started with lower orders.

    As published the coefficients (55, -59, 37, -9)/24 are those of equal steps in sigma: order 4 there, and 2 on grids
    whose step varies smoothly. ``variable_step=True`` computes the coefficients that the actual steps ask for: order 4.
    """

    def update(y: Tensor, sigma: float, past: Sequence[Estimate]) -> Tensor:
        step = sigma - past[0].sigma
        nodes = [(e.sigma - past[0].sigma) / step if variable_step else float(-j) for j, e in enumerate(past)]
        weights = _weights(nodes, [1 / (k + 1) for k in range(len(nodes))])
        return y + step * _combine(weights, [e.noise for e in past])

    return _multistep(update, 4, field, x0, times, path, trajectory)


def unipc(
    field: Field, x0: Tensor, times: Tensor, path: GaussianPath, trajectory: bool = False, *, order: int = 2
) -> Tensor:
    """UniPC-p (Zhao et al. 2023) for the data prediction with B(h) = e^h - 1 ("bh2"), p = ``order`` of 1, 2 or 3.

    Every step is predicted, and corrected once z is known at the predicted point, which the next step uses as well: no
    further evaluations; the last point stays as predicted. As published, UniP-2 and UniC-1 take the coefficient 1/2,
    which makes UniP-2 the step of DPM-Solver++(2M). Order p + 1. Unlike some implementations the order is lowered only
    where sigma = 0, not in all of the last p steps.
    """
    check_order(order)
    alphas, sigmas = noise_levels(path, times)
    past: deque[Estimate] = deque(maxlen=order)

    def step(n: int, x: Tensor, t: float, t_next: float) -> Tensor:
        if n == 0:
            past.appendleft(Estimate(sigmas[0], *data_and_noise(field, path, x, t)))
        y, sigma, alpha = x / alphas[n], sigmas[n + 1], alphas[n + 1]
        predicted = alpha * (_unip(y, sigma, past) if sigma > 0 else past[0].data)
        if n + 2 == len(sigmas):
            return predicted
        estimate = Estimate(sigma, *data_and_noise(field, path, predicted, t_next))
        corrected = alpha * _unic(y, estimate, past)
        past.appendleft(estimate)
        return corrected

    return integrate(step, x0, times, trajectory)


def check_order(order: int) -> None:
    """Raise a UserError unless ``unipc`` has this order."""
    if order not in (1, 2, 3):
        raise UserError(f"unipc order must be 1, 2 or 3, got {order}")


def noise_levels(path: GaussianPath, times: Tensor) -> tuple[list[float], list[float]]:
    """(alpha, sigma) at all times; a UserError unless the times lie in [0, 1] and start where alpha > 0."""
    clock = check_times(times)
    if clock[0] < 0 or clock[-1] > 1:
        raise UserError(f"times on a path must lie in [0, 1], got {clock[0]:g} to {clock[-1]:g}")
    t = torch.tensor(clock, dtype=torch.float64)
    alpha = path.alpha(t)
    if not alpha[0] > 0:
        raise UserError(
            f"times start at t = {clock[0]:g}, where alpha = 0 and sigma = beta / alpha is infinite: start later "
            "(EDMGrid and LogitSNRGrid do), with noise scaled by beta(times[0])"
        )
    return alpha.tolist(), path.sigma(t).tolist()


def data_and_noise(field: Field, path: GaussianPath, x: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """(z, eps) that the velocity field implies at (x, time)."""
    return Velocity().data_and_noise(path, evaluate(field, x, time), x, batch_time(time, x))


def _multistep(
    update: Update, depth: int, field: Field, x0: Tensor, times: Tensor, path: GaussianPath, trajectory: bool
) -> Tensor:
    """March y with ``update``, which sees the last ``depth`` estimates."""
    alphas, sigmas = noise_levels(path, times)
    past: deque[Estimate] = deque(maxlen=depth)

    def step(n: int, x: Tensor, t: float, t_next: float) -> Tensor:
        past.appendleft(Estimate(sigmas[n], *data_and_noise(field, path, x, t)))
        sigma = sigmas[n + 1]
        return alphas[n + 1] * (update(x / alphas[n], sigma, past) if sigma > 0 else past[0].data)

    return integrate(step, x0, times, trajectory)


def _relax(y: Tensor, data: Tensor, ratio: float) -> Tensor:
    """``e^-h y + (1 - e^-h) z``: the exact step for constant z, with ratio = e^-h = next sigma / sigma."""
    return data + ratio * (y - data)


def _update_2m(y: Tensor, sigma: float, past: Sequence[Estimate]) -> Tensor:
    data = past[0].data
    if len(past) > 1:
        r = math.log(past[1].sigma / past[0].sigma) / math.log(past[0].sigma / sigma)
        data = data + (data - past[1].data) / (2 * r)
    return _relax(y, data, sigma / past[0].sigma)


def _unip(y: Tensor, sigma: float, past: Sequence[Estimate]) -> Tensor:
    return _update_2m(y, sigma, past) if len(past) < 3 else _interpolate(y, sigma, past, past)


def _unic(y: Tensor, new: Estimate, past: Sequence[Estimate]) -> Tensor:
    if len(past) == 1:
        return _relax(y, (past[0].data + new.data) / 2, new.sigma / past[0].sigma)
    return _interpolate(y, new.sigma, past, [new, *past])


def _interpolate(y: Tensor, sigma: float, past: Sequence[Estimate], nodes: Sequence[Estimate]) -> Tensor:
    """The exact step for z the polynomial in lambda through ``nodes``."""
    h = math.log(past[0].sigma / sigma)
    offsets = [math.log(past[0].sigma / e.sigma) / h for e in nodes]
    weights = _weights(offsets, _exponential_moments(h, len(nodes)))
    return sigma / past[0].sigma * y + _combine(weights, [e.data for e in nodes])


def _exponential_moments(h: float, count: int) -> list[float]:
    """``integral_0^h e^(s-h) (s/h)^k ds`` for k = 0 .. count - 1, by parts."""
    moments = [-math.expm1(-h)]
    for k in range(1, count):
        moments.append(1 - k * moments[-1] / h)
    return moments


def _weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights w with ``sum_j w_j nodes_j^k = moments_k``: the quadrature that is exact for polynomials."""
    powers = torch.vander(torch.tensor(nodes, dtype=torch.float64), increasing=True).T
    return torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()


def _combine(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    return sum((w * v for w, v in zip(weights[1:], values[1:], strict=True)), weights[0] * values[0])
