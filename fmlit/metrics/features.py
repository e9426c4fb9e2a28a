"""Features: what turns a uint8 image into a vector that a metric compares."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from fmlit.tensors import from_uint8


@contextmanager
def full_float32() -> Iterator[None]:
    """No TensorFloat-32 or bfloat16 inside products: training may allow them for speed, and change features by it."""
    at: Any = torch.backends  # whose attributes type checkers do not see
    products = (at.cudnn.conv, at.cudnn.rnn, at.cuda.matmul, at.mkldnn.conv, at.mkldnn.matmul)
    before = [product.fp32_precision for product in products]
    for product in products:
        product.fp32_precision = "ieee"
    try:
        yield
    finally:
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """12 hexadecimal digits of the names and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


class Features(ABC):
    """uint8 images (B, C, H, W) to float32 features (B, d), without gradients, autocast and TF32.

    Attributes:
        name: in metric names, protocols and file names: lower-case letters, digits and underscores.
        dimension: d; None until it is known from the first images.
        preprocessing: of the image inside the features, as a protocol states it.
        device: where the features are computed, and returned.
    """

    name: str
    dimension: int | None = None
    preprocessing: str = ""
    device: torch.device = torch.device("cpu")

    @property
    def fingerprint(self) -> str:
        """Of the weights, if there are any: cached statistics of other weights are not taken."""
        return ""

    @abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """(B, d) features of uint8 images on ``device``."""

    def to(self, device: torch.device | str) -> Self:
        """Move to the device; returns itself."""
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """
        Raises:
            ValueError: images are not uint8 (B, C, H, W), or the features not finite (B, d).
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"expected uint8 images (B, C, H, W), got {images.dtype} of {tuple(images.shape)}")
        with torch.autocast(self.device.type, enabled=False), full_float32():
            features = self.extract(images.to(self.device)).float()
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(f"{self.name} features of {len(images)} images have shape {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise ValueError(f"{self.name} features of images {tuple(images.shape)} hold NaN or infinite values")
        self.dimension = features.shape[1]
        return features


class PixelFeatures(Features):
    """The pixels themselves, in [-1, 1]: for tiny sets such as 8x8 digits, where Inception says little."""

    name = "pixels"

    def extract(self, images: Tensor) -> Tensor:
        return from_uint8(images).flatten(1)


class NetworkFeatures(Features):
    """The features of any network that maps float images in [-1, 1], (B, C, H, W), to (B, d).

    Args:
        module: put into evaluation mode; resizing and normalisation are its own business.
        name: of the features: must say which network this is, since numbers are cited under it.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in ("inception", "pixels"):
            raise ValueError(
                f"NetworkFeatures.name must be lower-case letters, digits and '_', and neither 'inception' nor "
                f"'pixels', got {name!r}"
            )
        self.module = module.eval()
        self.name = name
        self._fingerprint = weights_digest(module.state_dict())

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def to(self, device: torch.device | str) -> Self:
        self.module.to(device)
        return super().to(device)

    def extract(self, images: Tensor) -> Tensor:
        return self.module(from_uint8(images))
