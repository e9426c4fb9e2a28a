"""All metrics of a stream of generated images in one pass."""

import warnings
from collections.abc import Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.processes import ProcessGroup
from fmlit.core.tensors import to_uint8
from fmlit.metrics.bottom_k import BottomKSample, image_keys
from fmlit.metrics.cost import Cost, Meter
from fmlit.metrics.features import Features
from fmlit.metrics.frechet import GaussianStatistics, frechet_distance
from fmlit.metrics.kernel import kernel_distance
from fmlit.metrics.precision_recall import NEAREST, precision_recall
from fmlit.metrics.protocol import Protocol, metric_key
from fmlit.metrics.reference import Reference

Metric = Literal["fid", "kid", "precision", "recall"]
INCEPTION_SCORE = ("is", "isc", "inception_score")
FAR, FEW = 1.5, 0.01  # samples overshoot [-1, 1] a little: under strong guidance, 0.1 % of their values lie beyond 1.5


def quantize(samples: Tensor) -> Tensor:
    """Samples in [-1, 1], clamped and rounded to uint8; with a warning where they are of another range, or diverged.

    Raises:
        UserError: they hold NaN or infinite values.
    """
    images = to_uint8(samples)
    if (samples.abs() > FAR).float().mean() > FEW:
        warnings.warn(
            f"more than {FEW:.0%} of the samples' values lie beyond +-{FAR} and are clamped to [-1, 1]: the model is "
            "hardly trained, sampling diverges, or its data have another range",
            stacklevel=2,
        )
    return images


class ImageQuality:
    """Distances of generated images from one or more references, in one pass over the images::

        quality = ImageQuality(InceptionFeatures(), reference, metrics=("fid", "kid"))
        for images in stream: quality.update(images)
        scores = quality.reduce().compute()          # {"fid_5k": 7.31, "kid_5k": 0.0021}

    The Fréchet distance takes all images. Kernel distance, precision and recall take at most as many as the reference
    keeps: a random subset that is the same for any order of the images and any number of processes.

    Args:
        features: on the device where they shall run.
        reference: real images' statistics by the same features. Of several, e.g. train and test, the first is the one
            that plain names speak of; the others' scores end in their split: ``fid_5k_test``.
        metrics: any of fid, kid, precision, recall. Keys name the number of images behind each value, and the features
            unless they are Inception's (see ``metric_key``).
    """

    def __init__(
        self, features: Features, reference: Reference | Sequence[Reference], metrics: Sequence[Metric] = ("fid", "kid")
    ) -> None:
        self.features = features
        self.metrics = tuple(metrics)
        self.references = (reference,) if isinstance(reference, Reference) else tuple(reference)
        check_metrics(self.metrics)
        _check_references(self.references, features, self.metrics)
        self.statistics, self._meter = GaussianStatistics(), Meter(features.device)
        wanted = max(len(r.features) for r in self.references) if set(self.metrics) - {"fid"} else 0
        self._rows = BottomKSample(wanted)
        self._digest, self._brightest, self._reduced = 0, 0, False

    @property
    def count(self) -> int:
        """Number of images seen; after ``reduce`` by all ranks."""
        return self.statistics.count

    @property
    def digest(self) -> str:
        """Of the set of images, whatever their order and whoever saw which: equal digests, equal images."""
        return f"{self._digest % 2**64:016x}"

    def update(self, images: Tensor) -> None:
        """Add generated uint8 images (B, C, H, W), of the reference's height and width; B may be 0.

        Raises:
            UserError: for any other input; nothing is counted then.
            RuntimeError: after ``reduce``.
        """
        if self._reduced:
            raise RuntimeError("these metrics were reduced over ranks already: start with a new ImageQuality")
        self._check_images(images)
        if len(images) == 0:
            return
        with self._meter.timing("features"):
            features = self.features(images)
        keys = image_keys(images)
        self.statistics.update(features)
        self._digest += sum(keys.tolist())
        self._brightest = max(self._brightest, int(images.max()))
        if self._rows.capacity:
            self._rows.update(keys, features)

    def _check_images(self, images: Tensor) -> None:
        if images.is_floating_point() and not torch.isfinite(images).all():
            raise UserError(f"generated images of shape {tuple(images.shape)} hold NaN or infinite values")
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UserError(
                f"expected uint8 images (B, C, H, W), got {images.dtype} of shape {tuple(images.shape)}: "
                "fmlit.core.tensors.to_uint8 converts from [-1, 1]"
            )
        expected = self.references[0].image_shape
        if expected is not None and tuple(images.shape[-2:]) != expected[-2:]:
            raise UserError(
                f"generated images are {images.shape[-2]}x{images.shape[-1]} pixels and the reference's "
                f"{expected[-2]}x{expected[-1]}: distances between different sizes mean nothing"
            )

    def reduce(self) -> Self:
        """Bring together what all ranks of torch.distributed have seen; returns itself.

        Every rank must call it, also one that saw no images. Then any single rank may call ``compute``.
        """
        if not self._reduced:
            self._meter.lap("seconds")
            ranks = ProcessGroup.current()
            self.statistics = self.statistics.reduce(ranks)
            self._rows = self._rows.reduce(ranks) if self._rows.capacity else self._rows
            digests, brightest = zip(*ranks.gather_objects((self._digest, self._brightest)), strict=True)
            self._digest, self._brightest = sum(digests), max(brightest)
            self._reduced = True
        return self

    def compute(self) -> dict[str, float]:
        """All scores of the images seen; without communication.

        Raises:
            UserError: fewer than 2 images were seen, or too few for the neighbors of precision and recall.
        """
        if self.count < 2:
            raise UserError(f"image quality needs at least 2 generated images, got {self.count}")
        if self._brightest <= 1:
            warnings.warn("no pixel is brighter than 1 of 255: were images in [0, 1] cast to uint8?", stacklevel=2)
        scores: dict[str, float] = {}
        with self._meter.timing("distances"):
            for reference in self.references:
                suffix = "" if reference is self.references[0] else f"_{reference.identity.split}"
                scores |= {key + suffix: value for key, value in self._scores(reference).items()}
        return scores

    def cost(self) -> Cost:
        """Time and memory since the construction; every rank must call it, after ``reduce`` and ``compute``."""
        return self._meter.cost(self.count, ProcessGroup.current())

    def _scores(self, reference: Reference) -> dict[str, float]:
        scores, name, device = {}, self.features.name, self.features.device
        if "fid" in self.metrics:
            fewest, dimension = min(self.count, reference.count or self.count), self.statistics.dimension
            if fewest <= dimension:
                warnings.warn(
                    f"a Fréchet distance from {fewest} images in {dimension} dimensions: the covariance is "
                    "rank-deficient and the value far above that of more images; compare it at equal counts only",
                    stacklevel=3,
                )
            scores[metric_key("fid", name, self.count)] = frechet_distance(self.statistics, reference)
        real = reference.features.to(device)
        rows = self._rows.rows[: len(real)].to(device)
        if "kid" in self.metrics:
            scores[metric_key("kid", name, len(rows))] = kernel_distance(rows, real)
        if {"precision", "recall"} & set(self.metrics):
            both = precision_recall(rows, real[: len(rows)])._asdict()  # at equal counts: both depend on them
            scores |= {metric_key(key, name, len(rows)): value for key, value in both.items() if key in self.metrics}
        return scores

    def protocol(self, weights: str = "", sampler: str = "") -> Protocol:
        """How the Fréchet distance to the first reference was measured; see ``Protocol`` for the arguments."""
        of, preprocessing = self.references[0].identity, self.features.preprocessing
        return Protocol(of.features, self.count, of.split, preprocessing, of.flip, weights, sampler)


def check_metrics(metrics: Sequence[str], n: int | None = None) -> None:
    """Raise a UserError for unknown metrics, and for metrics that need more than ``n`` images."""
    for metric in metrics:
        if metric.lower() in INCEPTION_SCORE:
            raise UserError(
                f"metric {metric!r} is not offered: the Inception Score needs the network's logits, which weights for "
                "FID need not hold; take fid or kid"
            )
        if metric not in get_args(Metric):
            raise UserError(f"unknown metric {metric!r}: choose from {', '.join(get_args(Metric))}")
    if not metrics:
        raise UserError(f"no metrics: choose from {', '.join(get_args(Metric))}")
    if n is not None and n <= NEAREST and {"precision", "recall"} & set(metrics):
        raise UserError(f"precision and recall need more than {NEAREST} samples, got n = {n}")


def _check_references(references: tuple[Reference, ...], features: Features, metrics: tuple[str, ...]) -> None:
    if not references:
        raise UserError("image quality needs at least one reference")
    for reference in references:
        identity = reference.identity
        if (identity.features, identity.weights) != (features.name, features.fingerprint):
            raise UserError(
                f"the reference {identity.split} holds {identity.features} features (weights "
                f"{identity.weights or 'none'}), and generated images would be given {features.name} features (weights "
                f"{features.fingerprint or 'none'})"
            )
        single = [metric for metric in metrics if metric != "fid"]
        if single and not len(reference.features):
            raise UserError(
                f"metric {single[0]} needs the features of single images, and {identity.split} holds mu and sigma "
                "alone: leave it out, or give a reference with pictures in arr_0"
            )
    shapes = [reference.image_shape for reference in references]
    if len({shape and shape[-2:] for shape in shapes}) > 1:
        raise UserError(f"references of different image sizes: {shapes}")
    splits = [reference.identity.split for reference in references[1:]]
    if len(set(splits)) < len(splits):
        raise UserError(f"two references of the same split among {splits}: their scores would share a name")
