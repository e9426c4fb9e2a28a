"""Scores of images, and of the model behind them, against one data set."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor

from fmlit import solvers
from fmlit.core.errors import UserError
from fmlit.core.processes import ProcessGroup
from fmlit.core.progress import progress
from fmlit.core.randomness import training_generator
from fmlit.core.tensors import expand_time
from fmlit.data.data_module import DataModule, Split
from fmlit.data.stores import LabeledDataset
from fmlit.flows.times import sampling_limits
from fmlit.metrics import (
    ClassReader,
    Features,
    ImageQuality,
    InceptionFeatures,
    PixelFeatures,
    Reference,
    nearest_neighbors,
    reference_statistics,
)
from fmlit.metrics.image_quality import Metric
from fmlit.metrics.protocol import count_label
from fmlit.models.generative_model import GenerativeModel, evaluation_mode
from fmlit.sampling.guidance import guided_velocity
from fmlit.solvers import likelihood

MODEL_METRICS = ("class", "bpd")  # these ask the model, the others its images alone
METRICS = (*get_args(Metric), *MODEL_METRICS)
READABLE = 10_000  # real images that the class reader is fitted to: its time is quadratic in their number
SMALL = 32  # pixels: Inception was made for larger images, and below this side it sees little but its own resize


def choose_features(features: str | Features | None, shape: Sequence[int]) -> Features:
    """``inception``, ``pixels``, or features as they are; None is pixels for images with a side below 32 pixels."""
    if isinstance(features, Features):
        return features
    if features is None:
        features = "pixels" if min(shape[1:]) < SMALL else "inception"
    if features not in ("inception", "pixels"):
        raise UserError(f"features must be inception, pixels or a class of features, got {features!r}")
    return InceptionFeatures() if features == "inception" else PixelFeatures()


class Scorer:
    """Scores any number of sets of images against the same data; all ranks of a process group take part.

    Args:
        data: the real images.
        metrics: any of fid, kid, precision, recall, and ``class``, the share of images that a classifier of real ones
            (see ``ClassReader``) reads as the class that was asked for.
        features: in which distances are taken.
        splits: of the data; plain names speak of the first, names of the others end in theirs.
        flip: let the reference hold every image's mirror image as well.
        cache: folder of the reference statistics.
        batch_size: images per call of the features.
        device: where the features run.
        ranks: the processes that share the work.
    """

    def __init__(
        self,
        data: DataModule,
        metrics: Sequence[str],
        features: Features,
        splits: Sequence[str] = ("train",),
        flip: bool = False,
        cache: str | Path = "data/statistics",
        batch_size: int = 250,
        device: torch.device | str = "cpu",
        ranks: ProcessGroup = ProcessGroup(),
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if "class" in metrics and data.num_classes is None:
            raise UserError(f"metric class needs classes, and {type(data).__name__} has none here")
        self.data, self.metrics, self.flip = data, tuple(metrics), flip
        self.splits = cast(tuple[Split, ...], tuple(splits))  # the data check them
        self.cache, self.batch_size, self.device, self.ranks = cache, batch_size, torch.device(device), ranks
        self.distances = cast(tuple[Metric, ...], tuple(m for m in metrics if m in get_args(Metric)))
        self._features = features

    @cached_property
    def features(self) -> Features:
        """On their device. Large weights are read here, and not where no distance is asked for."""
        return self._features.to(self.device)

    @property
    def identity(self) -> dict[str, Any]:
        """What scores depend on besides the images."""
        identity: dict[str, Any] = {"metrics": [metric for metric in self.metrics if metric != "bpd"]}
        splits = self.splits if self.distances else ()
        if self.distances:
            identity |= {"features": self.features.name, "features_weights": self.features.fingerprint}
            identity |= {"splits": list(splits), "flip": self.flip}
        if "class" in self.metrics:
            splits = tuple(sorted({*splits, "train"}))
        return identity | {"data": {split: self.data.fingerprint(split) for split in splits}}

    @cached_property
    def references(self) -> list[Reference]:
        """The statistics of each split, from the cache or computed now."""
        return [self._reference(split) for split in self.splits]

    def _reference(self, split: Split) -> Reference:
        def bar(loader: Iterable[Tensor]) -> Iterable[Tensor]:
            return progress(loader, len(cast(Sized, loader)), f"statistics of {split}", self.ranks.rank == 0)

        dataset, fingerprint = self.data.dataset(split), self.data.fingerprint(split)
        return reference_statistics(
            dataset,
            fingerprint,
            self.features,
            split,
            self.cache,
            flip=self.flip,
            batch_size=self.batch_size,
            num_workers=self.data.num_workers,
            progress=bar,
        )

    @cached_property
    def reader(self) -> ClassReader:
        """Reads classes; fitted to training images."""
        dataset = self.data.dataset("train")
        subset = np.random.default_rng(0).permutation(len(dataset))[:READABLE]
        return ClassReader(*dataset.batch(subset.tolist()))

    def score(
        self, batches: Iterable[tuple[Tensor, Tensor | None]], weights: str = "", sampler: str = ""
    ) -> dict[str, Any]:
        """``{"scores": {...}, "protocol": ..., "images": digest, "cost": {...}, "seconds": ...}`` of images that all
        ranks share. Cost is that of distances; seconds do not count what other sets share: references and the reader.

        Args:
            batches: this rank's uint8 images (B, C, H, W), each with the labels (B,) that were asked for, or None.
            weights, sampler: what the protocol string says of the origin of the images.
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


def bits_per_dimension(
    model: GenerativeModel,
    data: DataModule,
    n: int,
    seed: int = 0,
    batch_size: int = 250,
    weights: str = "ema",
    ranks: ProcessGroup = ProcessGroup(),
) -> dict[str, Any]:
    """Bits that the model needs per pixel and channel of n random test images, an upper bound; as ``Scorer.score``.

    The mean over images of ``-log2 p(z) / dimensions``, with its standard error: by dopri5 at 1e-5, Hutchinson's
    estimate of the divergence and one draw of uniform dequantization per image. A conditional model is asked for
    p(z | label). Where the model's clock ends before t = 1, z enters as ``alpha z``, whose density is that of z divided
    by ``alpha^dimensions``.
    """
    dataset = data.dataset("test")
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:n]
    limits = sampling_limits(model.path, model.prediction)
    times = torch.tensor(limits, dtype=torch.float64)
    bits = []
    with ranks.fail_together(), evaluation_mode(model):
        for start in range(ranks.rank * batch_size, len(chosen), ranks.size * batch_size):
            images, labels = dataset.batch(chosen[start : start + batch_size].tolist())
            if images.dtype != torch.uint8:
                raise UserError(f"metric bpd is of 8-bit images, and {type(data).__name__} holds {images.dtype}")
            generator = training_generator(seed, start, "bpd")
            z = likelihood.dequantize(images, generator).to(model.device)
            field = guided_velocity(model, None if model.num_classes is None else labels.to(model.device), 1.0)
            alpha = model.path.alpha(torch.full((len(z),), limits.end, device=z.device))
            z = expand_time(alpha, z) * z
            log_prob = likelihood.log_likelihood(field, z, times, "hutchinson", solvers.dopri5, generator)
            log_prob = log_prob + math.prod(model.shape) * alpha.log()
            bits.append(likelihood.bits_per_dimension(log_prob, model.shape).double().cpu())
    values = ranks.gather_rows(torch.cat(bits) if bits else torch.empty(0, dtype=torch.float64))
    label = count_label(len(values))
    kind = "conditional" if model.num_classes else "unconditional"
    return {
        "scores": {f"bpd_{label}": values.mean().item(), "bpd_error": values.std().item() / len(values) ** 0.5},
        "protocol": f"bpd{label}-test-dequantised-hutchinson-{kind}-{weights}-dopri5",
    }


def nearest_in(
    dataset: LabeledDataset,
    features: Features,
    images: Tensor,
    k: int,
    batch_size: int,
    ranks: ProcessGroup = ProcessGroup(),
) -> tuple[Tensor, Tensor]:
    """The k items nearest to each of n uint8 images by their features: distances and indices (n, k), on all ranks.

    Every item is looked at, so that a copied training image is found wherever it is.
    """
    queries = features(images)
    distances, indices = torch.empty(0, len(images), dtype=torch.float64), torch.empty(0, len(images)).long()
    with ranks.fail_together():
        for start in range(ranks.rank * batch_size, len(dataset), ranks.size * batch_size):
            members = features(dataset.batch(range(start, min(start + batch_size, len(dataset))))[0])
            found = nearest_neighbors(queries, members, min(k, len(members)))
            distances = torch.cat([distances, found.distances.T.cpu()])
            indices = torch.cat([indices, start + found.indices.T.cpu()])
            distances, indices = _nearest(distances, indices, k)
    distances, indices = _nearest(ranks.gather_rows(distances), ranks.gather_rows(indices), k)
    return distances.T, indices.T


def _nearest(distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each column, and the indices there."""
    distances, rows = distances.topk(min(k, len(distances)), dim=0, largest=False)
    return distances, indices.gather(0, rows)


def beside_neighbors(images: Tensor, indices: Tensor, dataset: LabeledDataset) -> Iterator[Tensor]:
    """Each image (C, H, W), followed by its neighbors (k, C, H, W): the rows of a picture."""
    for image, neighbors in zip(images, indices.tolist(), strict=True):
        yield torch.cat([image[None].cpu(), dataset.batch(neighbors)[0]])
