"""Memorisation: what the exact field of a finite training set does, and how samples are found to be copies."""

from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from docs.draw import style
from docs.draw.oracle import exact_model
from fmlit.core.randomness import image_seeds
from fmlit.core.tensors import from_uint8
from fmlit.data.digits import Digits
from fmlit.flows.mixtures import GaussianMixture
from fmlit.metrics.precision_recall import nearest_neighbors
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.generate import balanced_labels
from fmlit.sampling.samplers import ODESampler

COPY = 1 / 3  # of the distance to the second nearest


class Memorisation(NamedTuple):
    """For each of n samples: the nearest training item, the distance to it, and whether that makes it a copy."""

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
        return (
            f"{'memorization' if self.share > 0.5 else 'no memorization'}: {self.share:.0%} of the samples are copies"
        )


def memorization(samples: Tensor, training: Tensor) -> Memorisation:
    """Compare samples (n, *shape) with distinct training items (m, *shape), by Euclidean distance.

    A sample is called a copy if it lies closer to its nearest training item than a third of the distance to the second
    nearest (Yoon et al. 2023; Gu et al. 2023): no threshold in the units of the data.
    """
    distances, nearest = nearest_neighbors(samples.flatten(1), training.flatten(1), k=2)
    return Memorisation(nearest[:, 0], distances[:, 0], distances[:, 0] < COPY * distances[:, 1])


def real_digits() -> Tensor:
    """All 1,797 digits of scikit-learn, 1,437 of them those that ``data.Digits`` trains on, in [-1, 1]: float32
    (1797, 1, 8, 8), the held-out ones last."""
    data = Digits()
    return from_uint8(
        torch.cat([data.dataset(split).batch(range(len(data.dataset(split))))[0] for split in ("train", "test")])
    )


def sample_exactly(training: Tensor, n: int, seed: int = 0, sampler: ODESampler = ODESampler()) -> Tensor:
    """n samples (n, *shape) of the model that has learned its training set perfectly: Diracs at the items."""
    return sampler.sample(exact_model(GaussianMixture(training, 0.0)), image_seeds(seed, range(n)))


def _pairs(axes: Axes, samples: Tensor, training: Tensor, found: Memorisation, title: str, shown: int) -> None:
    """Samples above their nearest training images."""
    rows = torch.stack([samples[:shown], training[found.nearest[:shown]]])
    style.image_rows(axes, rows.cpu(), ["sample", "nearest real"])
    axes.set_title(f"{title}\n{found.verdict}", fontsize=9)


@style.styled
def digits_as_diracs(model: GenerativeModel | None = None, n: int = 500, shown: int = 14) -> Figure:
    """Samples of the exact field of the real digits beside the digits nearest to them; and those of a trained model."""
    digits = real_digits()
    compared = {f"exact field of {len(digits):,} digits as Diracs": sample_exactly(digits, n)}
    if model is not None:
        trained = ODESampler().sample(model, image_seeds(0, range(n)), balanced_labels(model, range(n)))
        compared["trained network"] = trained
    figure, axes = style.panels(len(compared), 1, (9.6, 1.0 + 1.2 * len(compared)))
    for (title, samples), panel in zip(compared.items(), axes[:, 0], strict=True):
        _pairs(panel, samples, digits, memorization(samples, digits), f"{title}, {n} samples", shown)
    return figure
