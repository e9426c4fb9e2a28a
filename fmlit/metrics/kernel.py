"""The kernel distance between two sets of features: KID (Bińkowski et al. 2018)."""

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.metrics.frechet import in_float64


def _kernel_sum(x: Tensor, y: Tensor, chunk: int) -> float:
    """Sum over all pairs of the kernel ``(x . y / d + 1)^3``."""
    return sum((rows @ y.T / x.shape[1] + 1).pow(3).sum().item() for rows in x.split(chunk))


def _diagonal_sum(x: Tensor) -> float:
    return (x.square().sum(dim=1) / x.shape[1] + 1).pow(3).sum().item()


@torch.no_grad()
def kernel_distance(generated: Tensor, real: Tensor, chunk: int = 1000) -> float:
    """Unbiased squared maximum mean discrepancy of (n, d) and (m, d) features, kernel ``(x . y / d + 1)^3``.

    Taken over all pairs at once, in float64: the mean over random subsets that other tools report has the same
    expectation and more noise. Unbiased, so it may be slightly negative. Memory: ``chunk`` x max(n, m) float64.
    """
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise UserError(f"features must be (n, d) and (m, d), got {tuple(generated.shape)} and {tuple(real.shape)}")
    n, m = len(generated), len(real)
    if min(n, m) < 2:
        raise UserError(f"a kernel distance needs at least 2 images on each side, got {n} and {m}")
    x, y = in_float64(generated), in_float64(real)
    within_x = (_kernel_sum(x, x, chunk) - _diagonal_sum(x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y, chunk) - _diagonal_sum(y)) / (m * (m - 1))
    return within_x + within_y - 2 * _kernel_sum(x, y, chunk) / (n * m)
