"""Scores of images against one data set."""

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.processes import ProcessGroup
from fmlit.core.progress import progress
from fmlit.data.data_module import DataModule
from fmlit.metrics import (
    ClassReader,
    Features,
    ImageQuality,
    InceptionFeatures,
    PixelFeatures,
    Reference,
    ReferenceFile,
)
from fmlit.metrics.image_quality import Metric
from fmlit.metrics.precision_recall import nearest_neighbors
from fmlit.metrics.protocol import count_label
from fmlit.metrics.reference import reference_statistics

MODEL_METRICS = ("class", "bpd")  # these ask the model, the others its images alone
METRICS = (*get_args(Metric), *MODEL_METRICS)
READABLE = 10_000  # real images that the class reader is fitted to: its time is quadratic in their number
SMALL = 32  # pixels: Inception was made for larger images, and below this side it sees little but its own resize


def choose_features(
    features: str | Features | None, shape: Sequence[int] = (), reference: ReferenceFile | None = None
) -> Features:
    """``inception``, ``pixels``, or features as they are. None stands for those of the reference file; without one for
    pixels where images have a side below 32 pixels, else inception.
    """
    if isinstance(features, Features):
        return features
    if features is None and reference is not None:
        features = reference.features
    if features is None:
        features = "pixels" if min(shape[1:]) < SMALL else "inception"
    if features not in ("inception", "pixels"):
        raise UserError(f"features must be inception, pixels or a class of features, got {features!r}")
    return InceptionFeatures() if features == "inception" else PixelFeatures()


class Scorer:
    """Scores any number of sets of images against the same data; all ranks of torch.distributed take part.

    Args:
        data: the real images; None if there is a reference file, and nothing else of the data is needed.
        metrics: any of fid, kid, precision, recall, and ``class``, the share of images that a classifier of real ones
            (see ``ClassReader``) reads as the class that was asked for.
        features: in which distances are taken.
        splits: of the data; plain names speak of the first, names of the others end in theirs.
        flip: let the reference hold every image's mirror image as well.
        cache: folder of the reference statistics.
        batch_size: images per call of the features.
        device: where the features run.
        reference: a file to compare with in place of the splits.
    """

    def __init__(
        self,
        data: DataModule | None,
        metrics: Sequence[str],
        features: Features,
        splits: Sequence[Any] = ("train",),  # the data check them
        flip: bool = False,
        cache: str | Path = "data/statistics",
        batch_size: int = 250,
        device: torch.device | str = "cpu",
        reference: ReferenceFile | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if "class" in metrics and data is not None and data.num_classes is None:
            raise UserError(f"metric class needs classes, and {type(data).__name__} has none here")
        self._data, self.metrics, self._features, self.splits, self.flip = data, metrics, features, splits, flip
        self.reference, self.cache, self.batch_size, self.device = reference, cache, batch_size, torch.device(device)
        self.distances: list[Metric] = [metric for metric in get_args(Metric) if metric in metrics]
        self.ranks, self.has_data = ProcessGroup.current(), data is not None
        if data is not None:
            self.check(data.shape)

    @property
    def data(self) -> DataModule:
        """The real images. A UserError if there is only a file with their statistics."""
        if self._data is None:
            raise UserError("this needs the real images, and not only statistics of them: give them by --data")
        return self._data

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """(C, H, W) of the real images; None if neither data nor reference file say."""
        if self._data is not None:
            return tuple(self._data.shape)
        return self.reference.image_shape if self.reference else None

    def check(self, shape: Sequence[int]) -> None:
        """Raise a UserError if images of this shape (C, H, W) cannot be compared with the reference file."""
        if self.reference is not None and self.distances:
            self.reference.check(self.features, shape)

    @cached_property
    def features(self) -> Features:
        """On their device. Large weights are read here, and not where no distance is asked for."""
        return self._features.to(self.device)

    @property
    def identity(self) -> dict[str, Any]:
        """What scores depend on besides the images."""
        identity: dict[str, Any] = {"metrics": [metric for metric in self.metrics if metric != "bpd"]}
        splits = self.splits if self.distances and self.reference is None else ()
        if self.distances:
            identity |= {"features": self.features.name, "features_weights": self.features.fingerprint}
            if self.reference is None:
                identity |= {"splits": list(splits), "flip": self.flip}
            else:
                identity |= {"reference": self.reference.name, "reference_sha256": self.reference.sha256}
        if "class" in self.metrics:
            splits = sorted({*splits, "train"})
        return identity | {"data": {split: self.data.fingerprint(split) for split in splits}}

    @cached_property
    def references(self) -> list[Reference]:
        """The statistics in the reference file, or else of each split, from the cache or computed now."""
        if self.reference is None:
            return [self._reference(split) for split in self.splits]
        where = self.features, self.distances, self.cache, self.batch_size
        return [self.reference.reference(*where, self._bar(self.reference.name))]

    def _bar(self, what: str) -> partial[Iterator[Any]]:
        return partial(progress, total=None, what=f"statistics of {what}", shown=self.ranks.rank == 0)

    def _reference(self, split: Any) -> Reference:
        dataset, fingerprint, workers = self.data.dataset(split), self.data.fingerprint(split), self.data.num_workers
        where = self.features, split, self.cache, self.flip, self.batch_size, workers
        return reference_statistics(dataset, fingerprint, *where, self._bar(split))

    @cached_property
    def reader(self) -> ClassReader:
        """Reads classes; fitted to training images."""
        dataset = self.data.dataset("train")
        subset = np.random.default_rng(0).permutation(len(dataset))[:READABLE]
        return ClassReader(*dataset.batch(subset.tolist()))

    def batches(self, n: int) -> list[range]:
        """This rank's batches of n items, as numbers of items."""
        starts = range(0, n, self.batch_size)[self.ranks.rank :: self.ranks.size]
        return [range(start, min(start + self.batch_size, n)) for start in starts]

    def score(
        self, batches: Iterable[tuple[Tensor, Tensor | None]], weights: str = "", sampler: str = ""
    ) -> dict[str, Any]:
        """``{"scores": {...}, "protocol": ..., "images": digest, "cost": {...}, "seconds": ...}`` of images that all
        ranks share. Cost is that of distances; seconds do not count what other sets share: references and the reader.

        Args:
            batches: this rank's uint8 images (B, C, H, W), each with the labels (B,) that were asked for, or None.
            weights: the name of the weights that made the images, for the protocol string.
            sampler: the name of the sampler that made them, for the protocol string.
        """
        quality = ImageQuality(self.features, self.references, self.distances) if self.distances else None
        reader = self.reader if "class" in self.metrics else None
        started = time.perf_counter()
        right = count = 0
        with self.ranks.fail_together():
            for images, labels in batches:
                if quality is not None:
                    quality.update(images)
                if reader is not None:
                    if labels is None:
                        raise UserError("metric class needs images of a class that was asked for: a conditional model")
                    right += int((reader.read(images) == labels.cpu()).sum())
                count += len(images)
        scores: dict[str, float] = {}
        origin: dict[str, Any] = {}
        if quality is not None:
            scores |= self.ranks.from_first(quality.reduce().compute)
            origin = {"protocol": str(quality.protocol(weights, sampler)), "images": quality.digest}
            origin["cost"] = quality.cost().record()
        if reader is not None:
            right, count = self.ranks.sum(torch.tensor([right, count])).tolist()
            scores |= {f"class_{count_label(count)}": right / count, "reader_accuracy": reader.accuracy}
        return {"scores": scores, **origin, "seconds": round(time.perf_counter() - started, 2)}

    def nearest(self, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k training items nearest to each of n uint8 images: distances and indices (n, k), on all ranks.

        Distances are between features. Every item is looked at, so a copied training image is found wherever it is.
        """
        dataset, queries = self.data.dataset("train"), self.features(images)
        distances, indices = torch.empty(0, len(images), dtype=torch.float64), torch.empty(0, len(images)).long()
        with self.ranks.fail_together():
            for batch in self.batches(len(dataset)):
                found = nearest_neighbors(queries, self.features(dataset.batch(batch)[0]), min(k, len(batch)))
                distances = torch.cat([distances, found.distances.T.cpu()])
                indices = torch.cat([indices, batch.start + found.indices.T.cpu()])
                distances, indices = _nearest(distances, indices, k)
        distances, indices = _nearest(self.ranks.gather_rows(distances), self.ranks.gather_rows(indices), k)
        return distances.T, indices.T


def _nearest(distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each column, and the indices there."""
    distances, rows = distances.topk(min(k, len(distances)), dim=0, largest=False)
    return distances, indices.gather(0, rows)
