"""Memorization: whether samples are copies of training items."""

from typing import NamedTuple

from torch import Tensor

from fmlit.metrics.precision_recall import nearest_neighbors

COPY = 1 / 3  # of the distance to the second nearest


class Memorization(NamedTuple):
    """How n samples relate to the training items.

    Attributes:
        nearest: index of the nearest training item, int64 (n,).
        distances: Euclidean distance to it, (n,).
        copied: whether the sample is a copy of it, bool (n,).
    """

    nearest: Tensor
    distances: Tensor
    copied: Tensor

    @property
    def share(self) -> float:
        """Share of samples that are copies."""
        return self.copied.double().mean().item()

    @property
    def verdict(self) -> str:
        """The finding in words."""
        finding = "memorization" if self.share > 0.5 else "no memorization"
        return f"{finding}: {self.share:.0%} of the samples are copies"


def memorization(samples: Tensor, training: Tensor) -> Memorization:
    """Compare samples (n, *shape) with distinct training items (m, *shape), by Euclidean distance.

    A sample counts as a copy if the distance to its nearest training item is less than a third of the distance to the
    second nearest (Yoon et al. 2023; Gu et al. 2023, https://arxiv.org/abs/2310.02664). Unlike a threshold on the
    distance itself, this does not depend on the units of the data.
    """
    distances, nearest = nearest_neighbors(samples.flatten(1), training.flatten(1), k=2)
    return Memorization(nearest[:, 0], distances[:, 0], distances[:, 0] < COPY * distances[:, 1])
