"""Reference statistics in files of other programs: pytorch-fid's and EDM's, ADM's, and those that fmlit writes."""

import dataclasses
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.files import expand, sha256
from fmlit.metrics.features import Features
from fmlit.metrics.reference import Identity, Reference, reference_statistics

ASYMMETRY = 1e-5  # of a covariance's largest entry: far above what rounding to float32 does


class ReferenceFile:
    """An ``.npz`` that images are scored against, in place of a data set.

    * ``mu`` (d,) and ``sigma`` (d, d), as pytorch-fid and EDM write them, suffice for the Fréchet distance. A file does
      not say which features these are of: Inception's are assumed unless others are asked for.
    * ``arr_0``, uint8 (N, H, W, C), are the pictures themselves (Dhariwal & Nichol 2021). All metrics can be measured.
      If there are mu and sigma as well, the Fréchet distance is taken from them.
    * fmlit's own files state their features and hold a part of them, so that all metrics can be measured.

    Other arrays, such as the mu_s and sigma_s of sFID, are ignored. Pickled objects are never opened.

    Args:
        path: of the file.

    Attributes:
        name: the part of protocols that names the file, and the start of its hash: ``ref.cifar10_train.ab12cd34``.
        sha256: of the file.
        image_shape: (C, H, W) of the images behind it; None if the file does not say.
        features: name of the features, as far as the file says.

    Raises:
        UserError: the file is missing, damaged or something else, or its statistics are not a mean and a covariance.
    """

    def __init__(self, path: str) -> None:
        file = expand(path, "reference")
        if not file.is_file():
            raise UserError(f"there is no reference file {path}")
        arrays = _read(file)
        self.path, self.sha256 = path, sha256(file)
        self.name = f"ref.{re.sub('[^A-Za-z0-9_.+]', '_', file.stem)}.{self.sha256[:8]}"
        self._pictures = self._own = self._gaussian = None
        self.image_shape: tuple[int, ...] | None = None
        self.features = "inception"
        if "header" in arrays:
            self._own = Reference.load(file)
            self.image_shape, self.features = self._own.image_shape, self._own.identity.features
        elif "arr_0" in arrays:
            self._pictures = _Pictures(arrays["arr_0"], path)
            self.image_shape = tuple(self._pictures[0][0].shape)
        if {"mu", "sigma"} <= set(arrays):
            self._gaussian = _gaussian(arrays["mu"], arrays["sigma"], path)
        elif self._pictures is None:
            raise UserError(f"{path} is not a reference: it has neither mu and sigma, nor pictures in arr_0")

    def check(self, features: Features, shape: Sequence[int]) -> None:
        """Raise a UserError unless images of this shape (C, H, W) and their features can be compared with the file's.

        The features of one black image tell their dimension.
        """
        if self.image_shape is not None and self.image_shape[1:] != tuple(shape[1:]):
            ours, theirs = ("x".join(map(str, size[1:])) for size in (shape, self.image_shape))
            raise UserError(
                f"the images behind {self.path} are {theirs} pixels, and those to score {ours}: distances between "
                "sizes mean nothing"
            )
        if self._gaussian is not None:
            given, dimension = len(self._gaussian[0]), features(torch.zeros(1, *shape, dtype=torch.uint8)).shape[1]
            if given != dimension:
                raise UserError(
                    f"{self.path} holds statistics in {given} dimensions, and {features.name} features have "
                    f"{dimension}: choose the --features that it was made with"
                )

    def reference(
        self,
        features: Features,
        metrics: Sequence[str],
        cache_dir: str | Path,
        batch_size: int = 100,
        progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    ) -> Reference:
        """What these metrics need of the file; features of pictures are computed by all ranks, and cached."""
        if self._own is not None:
            return dataclasses.replace(self._own, identity=dataclasses.replace(self._own.identity, split=self.name))
        if self._pictures is not None and (self._gaussian is None or set(metrics) - {"fid"}):
            source = self._pictures, self.sha256, features, self.name, cache_dir
            computed = reference_statistics(*source, batch_size=batch_size, progress=progress)
            if self._gaussian is None:
                return computed
            mean, covariance = self._gaussian
            return dataclasses.replace(computed, count=None, mean=mean, covariance=covariance)
        assert self._gaussian is not None
        mean, covariance = self._gaussian
        identity = Identity(self.sha256, 0, self.name, False, features.name, features.fingerprint, 0)
        nothing = torch.empty(0, len(mean)), torch.empty(0, dtype=torch.int64)
        return Reference(identity, self.image_shape, None, mean, covariance, *nothing)


class _Pictures:
    """The pictures in ``arr_0`` by index, with a label that nothing reads."""

    def __init__(self, pictures: np.ndarray, path: str) -> None:
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] not in (1, 3) or len(pictures) < 2:
            raise UserError(
                f"arr_0 of {path} must be at least 2 pictures, uint8 (N, H, W, C) with C = 1 or 3, got "
                f"{pictures.dtype} {pictures.shape}"
            )
        self.pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pictures[index], 0


def _read(file: Path) -> dict[str, Any]:
    """The arrays of an ``.npz`` that a reference may consist of."""
    if not zipfile.is_zipfile(file):
        raise UserError(f"{file} is not an .npz file")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("mu", "sigma", "arr_0", "header") if name in arrays.files}
    except Exception as error:  # zipfile and numpy have a dozen ways to say that a file is damaged
        raise UserError(f"{file} is damaged, or holds pickled objects, which are never opened") from error


def _gaussian(mean: np.ndarray, covariance: np.ndarray, path: str) -> tuple[Tensor, Tensor]:
    """Mean and covariance in float64."""
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path} needs mu (d,) and sigma (d, d), got {mean.shape} and {covariance.shape}")
    for name, values in (("mu", mean), ("sigma", covariance)):
        if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            raise UserError(f"{name} of {path} holds NaN, infinite values, or something other than numbers")
    if np.abs(covariance - covariance.T).max(initial=0) > ASYMMETRY * np.abs(covariance).max(initial=0):
        raise UserError(f"sigma of {path} is not symmetric, so it is not a covariance")
    if (covariance.diagonal() < 0).any():
        raise UserError(f"sigma of {path} has negative variances, so it is not a covariance")
    return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64))
