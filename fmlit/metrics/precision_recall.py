"""Nearest neighbors in feature space: precision and recall, and the training images closest to samples."""

from typing import NamedTuple

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.metrics.frechet import in_float64

NOISE = 1e-12  # squared distances below this share of the squared norms are rounding errors of float32 features

NEAREST = 3  # neighbors that make a point's ball (Kynkäänniemi et al. 2019)


class PrecisionRecall(NamedTuple):
    """precision: share of generated images on the real manifold; recall: share of real ones on the generated one."""

    precision: float
    recall: float


class Neighbors(NamedTuple):
    """(n, k) float64 distances, increasing, and (n, k) int64 row numbers."""

    distances: Tensor
    indices: Tensor


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m) by one matrix product, in float64. Equal rows are exactly 0 apart."""
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    squares = norms - 2 * x @ y.T
    return torch.where(squares <= NOISE * norms, 0.0, squares)


def _squared_radii(x: Tensor, k: int, chunk: int) -> Tensor:
    """(n,) squared distances to the k-th nearest other row."""
    radii = []
    for start in range(0, len(x), chunk):
        squares = _squared_distances(x[start : start + chunk], x)
        rows = torch.arange(len(squares), device=x.device)
        squares[rows, start + rows] = torch.inf  # no row is its own neighbor
        radii.append(squares.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _centered(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 around the mean of b: distances stay, and cancel less."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"features must be (n, d) and (m, d), got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = in_float64(a), in_float64(b)
    center = b.mean(dim=0)
    return a - center, b - center


@torch.no_grad()
def precision_recall(generated: Tensor, real: Tensor, k: int = NEAREST, chunk: int = 1000) -> PrecisionRecall:
    """Improved precision and recall of (n, d) and (m, d) features (Kynkäänniemi et al. 2019).

    An image is on a manifold if it lies within the distance of some member to that member's k-th nearest other member.
    Both values depend on n and m: compare them at equal counts only.
    """
    if min(len(generated), len(real)) <= k:
        raise UserError(f"precision and recall with k = {k} need more images, got {len(generated)} and {len(real)}")
    generated, real = _centered(generated, real)
    real_radii, generated_radii = _squared_radii(real, k, chunk), _squared_radii(generated, k, chunk)
    precise = 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radii in zip(generated.split(chunk), generated_radii.split(chunk), strict=True):
        squares = _squared_distances(rows, real)
        precise += int((squares <= real_radii).any(dim=1).sum())
        recalled |= (squares <= radii[:, None]).any(dim=0)
    return PrecisionRecall(precise / len(generated), recalled.double().mean().item())


@torch.no_grad()
def nearest_neighbors(queries: Tensor, members: Tensor, k: int = 1, chunk: int = 1000) -> Neighbors:
    """The k members (m, d) nearest to each query (n, d), nearest first: shows samples that copy training images."""
    if not 1 <= k <= len(members):
        raise UserError(f"k must lie between 1 and the number of members {len(members)}, got {k}")
    queries, members = _centered(queries, members)
    found = [_squared_distances(rows, members).topk(k, dim=1, largest=False) for rows in queries.split(chunk)]
    return Neighbors(torch.cat([f.values for f in found]).sqrt(), torch.cat([f.indices for f in found]))
