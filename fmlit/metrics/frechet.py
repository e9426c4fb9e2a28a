"""The Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017), in float64."""

from typing import Protocol

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.processes import ProcessGroup


class Gaussian(Protocol):
    """What a Fréchet distance is taken between."""

    @property
    def mean(self) -> Tensor: ...

    @property
    def covariance(self) -> Tensor: ...


def in_float64(x: Tensor) -> Tensor:
    """``x`` in float64: where it is, or on the CPU if its device has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


class GaussianStatistics:
    """Mean and covariance of a stream of features, accumulated in float64 around the running mean.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979), which does not cancel when all features
    share a large offset, as sums of squares do.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    @property
    def dimension(self) -> int:
        """d, or 0 before the first features."""
        return len(self._mean)

    @property
    def mean(self) -> Tensor:
        """(d,)."""
        self._need(1)
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """(d, d), normalized by count - 1."""
        self._need(2)
        return self._scatter / (self.count - 1)

    def _need(self, count: int) -> None:
        if self.count < count:
            raise UserError(f"statistics of {self.count} images: at least {count} are needed")

    # Metrics may be updated inside inference mode and read outside of it; normal tensors work in both.
    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add features (B, d) of any float type.

        Raises:
            UserError: for another shape or d than before, and for NaN or infinite values.
        """
        if features.ndim != 2 or (self.count and features.shape[1] != self.dimension):
            raise UserError(f"features must be (B, {self.dimension or 'd'}), got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise UserError(f"features of shape {tuple(features.shape)} hold NaN or infinite values")
        if len(features) == 0:
            return
        x = in_float64(features)
        if self.count == 0:
            self._mean = x.new_zeros(x.shape[1])
            self._scatter = x.new_zeros(x.shape[1], x.shape[1])
        total = self.count + len(x)
        batch_mean = x.mean(dim=0)
        shift, x = batch_mean - self._mean, x - batch_mean
        self._scatter.addmm_(x.T, x).addr_(shift, shift, alpha=self.count * len(x) / total)
        self._mean += shift * (len(x) / total)
        self.count = total

    @torch.inference_mode(False)
    @torch.no_grad()
    def reduce(self, ranks: ProcessGroup) -> "GaussianStatistics":
        """The statistics of all ranks' features together, the same on each; this object stays as it is.

        Two all-reduces: d numbers, then d^2. Ranks without features take part.
        """
        counts, dimensions = zip(*ranks.gather_objects((self.count, self.dimension)), strict=True)
        if len(set(dimensions) - {0}) > 1:
            raise ValueError(f"ranks hold features of different dimensions {dimensions}")
        total = GaussianStatistics()
        total.count = sum(counts)
        if total.count == 0:
            return total
        d = max(dimensions)
        mean = self._mean if self.count else torch.zeros(d, dtype=torch.float64)
        scatter = self._scatter if self.count else torch.zeros(d, d, dtype=torch.float64)
        total._mean = ranks.sum(mean * (self.count / total.count))
        shift = mean - total._mean
        total._scatter = ranks.sum(torch.addr(scatter, shift, shift, alpha=self.count))
        return total


def _factor(covariance: Tensor) -> Tensor:
    """F of shape (d, r) with F F^T = covariance of numerical rank r; eigenvalues below rounding error count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].abs() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


@torch.no_grad()
def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """``|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2)`` for covariances A, B.

    With A = F F^T and B = G G^T the trace of the root is the sum of the singular values of F^T G: symmetric in a and
    b, never complex, and exact where covariances are singular. Runs on the CPU.

    Raises:
        UserError: for NaN or infinite statistics, or different dimensions.
    """
    means = [in_float64(g.mean).cpu() for g in (a, b)]
    covariances = [in_float64(g.covariance).cpu() for g in (a, b)]
    if means[0].shape != means[1].shape:
        raise UserError(f"statistics of different dimensions: {len(means[0])} and {len(means[1])}")
    if not all(torch.isfinite(x).all() for x in (*means, *covariances)):
        raise UserError("the statistics hold NaN or infinite values: no Fréchet distance")
    root_trace = torch.linalg.svdvals(_factor(covariances[0]).T @ _factor(covariances[1])).sum()
    traces = covariances[0].trace() + covariances[1].trace()
    distance = (means[0] - means[1]).square().sum() + traces - 2 * root_trace
    return max(distance.item(), 0.0)  # below zero only by rounding
