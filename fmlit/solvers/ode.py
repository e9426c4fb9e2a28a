"""Solvers of ``dX/dt = field(X, t)``: plain functions that return X at ``times[-1]``, or at all times.

Shared contract of all solvers in this package:

* ``field(x, t)`` takes x (B, *shape) and t (B,) and returns like x. ``times`` is 1-D and increases strictly; step sizes
  are computed in float64, and time is cast to x's dtype only where the field is called.
* The result is (B, *shape), with ``trajectory=True`` (len(times), B, *shape), starting with x0.
* UserError for times that do not increase, a field of another shape than x, and NaN or infinite values, naming the
  first step with one. Finiteness is gathered on the device and read once, at the end.
* The options of a solver are its keyword-only arguments. ``records.py`` holds orders, costs and options of all solvers.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.tensors import Field


def euler(field: Field, x0: Tensor, times: Tensor, trajectory: bool = False) -> Tensor:
    """Euler's method: order 1, one evaluation per step."""

    def step(n: int, x: Tensor, t: float, t_next: float) -> Tensor:
        return x + (t_next - t) * evaluate(field, x, t)

    return integrate(step, x0, times, trajectory)


def midpoint(field: Field, x0: Tensor, times: Tensor, trajectory: bool = False) -> Tensor:
    """The explicit midpoint method: order 2, two evaluations per step, never at the end of a step."""

    def step(n: int, x: Tensor, t: float, t_next: float) -> Tensor:
        h = t_next - t
        half = x + h / 2 * evaluate(field, x, t)
        return x + h * evaluate(field, half, t + h / 2)

    return integrate(step, x0, times, trajectory)


def heun(field: Field, x0: Tensor, times: Tensor, trajectory: bool = False) -> Tensor:
    """Heun's method (explicit trapezoidal rule): order 2, two evaluations per step, the last one at ``times[-1]``."""

    def step(n: int, x: Tensor, t: float, t_next: float) -> Tensor:
        h = t_next - t
        k1 = evaluate(field, x, t)
        k2 = evaluate(field, x + h * k1, t_next)
        return x + h / 2 * (k1 + k2)

    return integrate(step, x0, times, trajectory)


def rk4(field: Field, x0: Tensor, times: Tensor, trajectory: bool = False) -> Tensor:
    """The classical Runge-Kutta method: order 4, four evaluations per step, the last one at ``times[-1]``."""

    def step(n: int, x: Tensor, t: float, t_next: float) -> Tensor:
        h = t_next - t
        k1 = evaluate(field, x, t)
        k2 = evaluate(field, x + h / 2 * k1, t + h / 2)
        k3 = evaluate(field, x + h / 2 * k2, t + h / 2)
        k4 = evaluate(field, x + h * k3, t_next)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return integrate(step, x0, times, trajectory)


def dopri5(
    field: Field, x0: Tensor, times: Tensor, trajectory: bool = False, *, rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """Dormand-Prince 5(4) with adaptive steps (torchdiffeq): ``times`` only say where the result is reported.

    The local error stays below ``atol + rtol |x|``. It is measured as the root mean square over the whole batch, so
    samples depend on their neighbors.

    Raises:
        UserError: also where no step is small enough: a singular field, or tolerances too tight for x0's dtype.
    """
    from torchdiffeq import odeint

    check_tolerances(rtol, atol)
    clock = check_times(times)
    _check_start(x0)
    end = clock[-1]
    _raise_unless_finite([torch.isfinite(x0).all()], clock)

    def checked_field(t: Tensor, x: Tensor) -> Tensor:
        time = min(t.detach().item(), end)  # the guess of a first step may probe the field beyond the end
        value = evaluate(field, x, time)
        if not torch.isfinite(value).all():  # no extra stall: step control reads the error estimate anyway
            raise UserError(f"dopri5: the field has NaN or infinite values at t = {time:g}")
        return value

    nodes = torch.tensor(clock, dtype=torch.float64, device=x0.device)
    options = {"step_t": nodes[-1:]}  # stop there: dopri5 would step over the end and interpolate back
    try:
        states = odeint(checked_field, x0, nodes, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:
        if "underflow" not in str(error):
            raise
        raise UserError(f"dopri5 cannot reach rtol={rtol:g}, atol={atol:g} in {x0.dtype}: {error}") from error
    return states if trajectory else states[-1]


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise a UserError unless ``dopri5`` can work with these tolerances."""
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise UserError(f"dopri5 needs rtol, atol >= 0 and not both 0, got rtol={rtol}, atol={atol}")


def integrate(
    step: Callable[[int, Tensor, float, float], Tensor], x0: Tensor, times: Tensor, trajectory: bool = False
) -> Tensor:
    """Apply ``x_{n+1} = step(n, x_n, t_n, t_{n+1})`` along ``times``; the loop of every fixed-step solver."""
    clock = check_times(times)
    _check_start(x0)
    x, states, finite = x0, [x0], [torch.isfinite(x0).all()]
    for n, (t, t_next) in enumerate(pairwise(clock)):
        x = step(n, x, t, t_next)
        finite.append(torch.isfinite(x).all())
        if trajectory:
            states.append(x)
    _raise_unless_finite(finite, clock)
    return torch.stack(states) if trajectory else x


def evaluate(field: Field, x: Tensor, time: float) -> Tensor:
    """``field(x, t)`` with ``time`` expanded to (B,), its shape checked, in x's dtype."""
    value = field(x, batch_time(time, x))
    if value.shape != x.shape:
        raise UserError(
            f"the field must return shape {tuple(x.shape)} like x, got {tuple(value.shape)} at t = {time:g}"
        )
    return value.to(x.dtype)


def batch_time(time: float, x: Tensor) -> Tensor:
    """``time`` as a (B,) tensor in the dtype and on the device of x."""
    return torch.full((x.shape[0],), time, dtype=x.dtype, device=x.device)


def check_times(times: Tensor) -> list[float]:
    """``times`` as floats; a UserError unless they are 1-D, at least two, finite and strictly increasing."""
    if times.ndim != 1 or len(times) < 2:
        raise UserError(f"times must be 1-D with at least 2 entries, got shape {tuple(times.shape)}")
    clock = times.tolist()
    for n, (t, t_next) in enumerate(pairwise(clock)):
        if not -float("inf") < t < t_next < float("inf"):
            raise UserError(f"times must be finite and increase strictly, got {t:g} then {t_next:g} at entry {n + 1}")
    return clock


def _check_start(x0: Tensor) -> None:
    if x0.ndim < 1 or not x0.is_floating_point():
        raise UserError(f"x0 must be a floating-point (B, *shape) tensor, got {x0.dtype} of shape {tuple(x0.shape)}")
    if x0.dtype.itemsize < 4:  # times near 1 would round to it, and steps be lost in the state
        raise UserError(f"x0 must be in float32 or float64, got {x0.dtype}: let the field compute in less instead")


def _raise_unless_finite(finite: Sequence[Tensor], clock: Sequence[float]) -> None:
    """``finite[n]`` says whether x at ``clock[n]`` is finite; one transfer from the device for the whole run."""
    flags = torch.stack(list(finite)).tolist()
    if all(flags):
        return
    n = flags.index(False)
    if n == 0:
        raise UserError(f"x0 has NaN or infinite values (t = {clock[0]:g})")
    raise UserError(
        f"NaN or infinite values appear in step {n} of {len(clock) - 1}, from t = {clock[n - 1]:g} to {clock[n]:g}: "
        "the field is not finite there, or the step is too large for it"
    )
