"""The theorem of Picard and Lindeloef at work: iterates that find the solution, and a field that has many."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from docs.draw import style
from fmlit import solvers
from fmlit.core.tensors import Field
from fmlit.flows.diffusions import ornstein_uhlenbeck


def picard_iterates(field: Field, x0: Tensor, times: Tensor, count: int) -> Tensor:
    """``X^{k+1}_t = x0 + integral_0^t u_s(X^k_s) ds`` from X^0 = x0: (count + 1, len(times), *x0.shape).

    The integral is taken by the trapezoidal rule on ``times`` (N,), for x0 (B, *shape). If u is Lipschitz in x with
    constant L, the error of X^k on [0, T] is at most (L T)^k / k! times that of X^0: the proof of the theorem.
    """
    column = (-1, *(1,) * x0.ndim)
    path = x0.expand(len(times), *x0.shape)
    iterates = [path]
    for _ in range(count):
        slopes = torch.stack([field(x, t.expand(len(x0))) for x, t in zip(path, times, strict=True)])
        areas = (slopes[1:] + slopes[:-1]) / 2 * times.diff().reshape(column)
        path = torch.cat([x0[None], x0 + areas.cumsum(0)])
        iterates.append(path)
    return torch.stack(iterates)


def square_root(x: Tensor, t: Tensor) -> Tensor:
    """u(x) = 2 sqrt|x|: continuous, not Lipschitz at 0. From X_0 = 0 start 0, and (t - s)^2 from any time s on."""
    return 2 * x.abs().sqrt()


@style.styled
def picard_lindeloef(theta: float = 3.0) -> Figure:
    """Left: Picard iterates of dX/dt = -theta X, Taylor polynomials of the solution. Right: three solutions from 0."""
    figure, ((left, right),) = style.panels(1, 2, (9.6, 3.6))
    times = torch.linspace(0, 1, 401, dtype=style.PLANE_DTYPE)
    one = torch.ones(1, 1, dtype=style.PLANE_DTYPE)

    drift, _ = ornstein_uhlenbeck(theta, 0.0)
    iterates = picard_iterates(drift, one, times, 8)
    for k in (0, 1, 2, 3, 5, 8):
        left.plot(times, iterates[k, :, 0, 0], label=f"$X^{{({k})}}$")
    left.plot(times, torch.exp(-theta * times), "--", color=style.EXACT, label=f"$e^{{-{theta:g} t}}$")
    left.set(xlabel="$t$", ylim=(-2.3, 4.0))
    left.set_title(f"Lipschitz: Picard iterates of $\\mathrm{{d}}X_t/\\mathrm{{d}}t = -{theta:g} X_t$, $X_0 = 1$")
    left.legend(ncols=4, loc="upper center")

    right.plot(times, times**2, color=style.DATA, label="$t^2$")
    right.plot(times, (times - 0.4).clamp(min=0) ** 2, color=style.ACCENT, label="0, from $t = 0.4$ on $(t - 0.4)^2$")
    right.plot(times, 0 * times, color=style.NOISE, label="0")
    coarse = times[::20]
    for start, marker in ((1e-6, "^"), (0.0, "o")):
        states = solvers.rk4(square_root, start * one, coarse, trajectory=True)[:, 0, 0]
        label = f"RK4 from $x_0 = {'10^{-6}' if start else '0'}$"
        right.plot(coarse, states, marker, color=style.EXACT, markersize=4, fillstyle="none", label=label)
    right.set(xlabel="$t$", title="not Lipschitz: $\\mathrm{d}X_t/\\mathrm{d}t = 2\\sqrt{|X_t|}$, $X_0 = 0$")
    right.legend(loc="upper left")
    return figure
