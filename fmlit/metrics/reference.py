"""Reference statistics of a data set: computed once by all ranks, cached, and never taken for something else."""

import dataclasses
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fmlit.core.errors import UserError
from fmlit.core.files import atomic_write, expand
from fmlit.core.processes import ProcessGroup
from fmlit.core.workers import WatchedLoader
from fmlit.metrics.features import Features
from fmlit.metrics.frechet import GaussianStatistics

log = logging.getLogger(__name__)

KEPT = 10_000  # images whose features are kept one by one, for KID, precision, recall and neighbors


class LabeledImages(Protocol):
    """Pairs of uint8 image (C, H, W) and label, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class Identity:
    """What a set of reference statistics is of: two that agree here are interchangeable.

    Args:
        data: fingerprint of the data set, as its data module states it.
        images: number of images in the split.
        split: "train", "test", ...
        flip: whether every image's mirror image is in as well.
        features: name of the features.
        weights: fingerprint of their weights.
        kept: number of images whose features are kept one by one.
    """

    data: str
    images: int
    split: str
    flip: bool
    features: str
    weights: str
    kept: int

    @property
    def filename(self) -> str:
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:16]
        return f"{self.features}-{self.split}-{digest}.npz"


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real images, on the CPU.

    Attributes:
        identity: what they are statistics of.
        image_shape: (C, H, W) of the images; None if a file of another program does not say.
        count: number of images; with flips, mirror images are counted. None if unknown.
        mean: (d,) float64.
        covariance: (d, d) float64, normalized by count - 1.
        features: (k, d) float32, of a random subset in random order.
        indices: (k,) int64, the images behind them; from ``identity.images`` on, mirror images.
    """

    identity: Identity
    image_shape: tuple[int, ...] | None
    count: int | None
    mean: Tensor
    covariance: Tensor
    features: Tensor
    indices: Tensor

    def save(self, path: str | Path) -> None:
        """Write an .npz in one atomic step: readers and other writers of ``path`` see a whole file, or none.

        Mean and covariance are stored as ``mu`` and ``sigma``, where pytorch-fid and its relatives look for them.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        header = {"identity": dataclasses.asdict(self.identity), "image_shape": self.image_shape, "count": self.count}
        tensors = {"mu": self.mean, "sigma": self.covariance, "features": self.features, "indices": self.indices}
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        with atomic_write(Path(path)) as file:
            np.savez(file, header=np.array(json.dumps(header)), **arrays)

    @staticmethod
    def load(path: str | Path) -> "Reference":
        """Read what ``save`` wrote.

        Raises:
            UserError: the file is damaged, or something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                tensors = [torch.from_numpy(file[name]) for name in ("mu", "sigma", "features", "indices")]
            identity = Identity(**header["identity"])
            return Reference(identity, tuple(header["image_shape"]), header["count"], *tensors)
        except Exception as error:  # zipfile and numpy have a dozen ways to say that a file is damaged
            raise UserError(f"{path} does not hold reference statistics: {error}") from error


class _Images(Dataset[Tensor]):
    """The images of a labeled data set, checked; with ``flip`` their mirror images follow."""

    def __init__(self, dataset: LabeledImages, split: str, flip: bool) -> None:
        self.dataset, self.split, self.flip = dataset, split, flip
        self.images = len(dataset)
        if self.images < 2:
            raise UserError(f"the {split} split holds {self.images} images: statistics need at least 2")
        self.shape = tuple(dataset[0][0].shape)

    def __len__(self) -> int:
        return self.images * (2 if self.flip else 1)

    def __getitem__(self, index: int) -> Tensor:
        image = self.dataset[index % self.images][0]
        if image.dtype != torch.uint8 or tuple(image.shape) != self.shape or image.ndim != 3:
            raise UserError(
                f"image {index % self.images} of the {self.split} split is {image.dtype} {tuple(image.shape)}; "
                f"all must be uint8 (C, H, W) of one size, and the first is {self.shape}"
            )
        return image if index < self.images else image.flip(-1)


def reference_statistics(
    dataset: LabeledImages,
    fingerprint: str,
    features: Features,
    split: str,
    cache_dir: str | Path,
    flip: bool = False,
    batch_size: int = 100,
    num_workers: int = 0,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Reference:
    """The statistics of all images of a data set, from the cache or computed by all ranks together; equal on each.

    Fixed batches are dealt to the ranks, so that the result does not depend on their number. The features of
    ``KEPT`` random images are kept. A cache that cannot be written costs only a warning.

    Args:
        dataset: map-style, of (uint8 image (C, H, W), label), without random augmentation.
        fingerprint: of the data; anything that changes when an image does.
        features: on the device where they run.
        split: which part of the data this is ("train", "test"): part of every protocol string.
        cache_dir: where ``{features}-{split}-{hash}.npz`` is kept.
        flip: add every image's mirror image.
        batch_size: images per call of the features.
        num_workers: processes that read the data.
        progress: wraps the stream of batches to show a bar.

    Raises:
        UserError: fewer than two images, an image that is not uint8 or of another size, or a cached
            file of this name that describes something else.
    """
    if not fingerprint:
        raise ValueError("reference statistics need the data's fingerprint: without one a cache could lie")
    ranks = ProcessGroup.current()
    images = _Images(dataset, split, flip)
    subset = np.random.default_rng(0).permutation(len(images))[:KEPT]
    identity = Identity(fingerprint, images.images, split, flip, features.name, features.fingerprint, len(subset))
    path = expand(cache_dir, "cache") / identity.filename
    cached = ranks.from_first(lambda: _cached(path, identity))
    if cached is not None:
        return cached
    log.info("computing the %s features of %d %s images once, for %s", features.name, len(images), split, path)
    with ranks.fail_together():
        starts = range(0, len(images), batch_size)[ranks.rank :: ranks.size]
        batches = [list(range(start, min(start + batch_size, len(images)))) for start in starts]
        generator = torch.Generator()  # a loader draws a seed even where it shuffles nothing
        loader = WatchedLoader(images, batch_sampler=batches, num_workers=num_workers, generator=generator)
        statistics, indices, rows = _accumulate(batches, progress(loader), features, frozenset(subset.tolist()))
    statistics = statistics.reduce(ranks)
    indices, rows = ranks.gather_rows(indices), ranks.gather_rows(rows)
    order = indices.argsort()[torch.from_numpy(subset).argsort().argsort()]  # from the ranks' order to the subset's
    mean, covariance = statistics.mean.cpu(), statistics.covariance.cpu()
    reference = Reference(identity, images.shape, statistics.count, mean, covariance, rows[order], indices[order])
    if ranks.rank == 0:
        try:
            reference.save(path)
        except OSError as error:
            warnings.warn(f"the reference statistics are not cached, {path} cannot be written: {error}", stacklevel=2)
    return reference


def _cached(path: Path, identity: Identity) -> Reference | None:
    """The statistics at ``path``; None where there are none, or (with a warning) a damaged file."""
    if not path.is_file():
        return None
    try:
        reference = Reference.load(path)
    except ValueError as error:
        warnings.warn(f"{error}; computing them again", stacklevel=2)
        return None
    if reference.identity != identity:
        raise UserError(f"{path} holds statistics of {reference.identity} instead of {identity}: delete it")
    return reference


def _accumulate(
    batches: Sequence[Sequence[int]], images: Iterable[Tensor], features: Features, subset: frozenset[int]
) -> tuple[GaussianStatistics, Tensor, Tensor]:
    """Statistics of these batches, and (indices, features) of the images that belong to the subset."""
    statistics = GaussianStatistics()
    indices: list[int] = []
    rows: list[Any] = []
    for batch, pixels in zip(batches, images, strict=True):
        values = features(pixels)
        statistics.update(values)
        places = [place for place, index in enumerate(batch) if index in subset]
        indices += [batch[place] for place in places]
        rows.append(values[places].cpu())
    return statistics, torch.tensor(indices, dtype=torch.int64), torch.cat(rows) if rows else torch.empty(0, 0)
