"""Features: what turns a uint8 image into a vector that a metric compares."""

import hashlib
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fmlit.core.errors import UserError
from fmlit.core.files import expand
from fmlit.core.tensors import from_uint8

CPU_CHUNK = 16  # images at a time on a CPU; Inception is a third slower with 100


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


def read_weights(path: str) -> dict[str, Tensor]:
    """The state dict in a PyTorch file, no code of which is run, or in a ``.safetensors``.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    path = str(expand(path, "weights"))
    if not Path(path).is_file():
        raise UserError(f"there is no weights file {path}")
    try:
        safetensors = path.endswith(".safetensors")
        state: Any = load_file(path) if safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text proposes to run it all the same
        raise UserError(f"{path} is not a weights file: it holds something other than tensors") from error
    except Exception as error:  # whatever a file that is something else makes of its reader
        reason = re.split(r"\. |\n", str(error))[0] or type(error).__name__
        raise UserError(f"{path} is not a weights file: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a state dict, names and tensors, but {type(state).__name__}")
    return state


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

    def rgb_chunks(self, images: Tensor) -> Sequence[Tensor]:
        """Gray or RGB images as RGB. On a CPU in chunks that fit its caches, on a GPU all at once."""
        if images.shape[1] not in (1, 3):
            raise UserError(f"{self.name} features take gray or RGB images, got {images.shape[1]} channels")
        return images.expand(-1, 3, -1, -1).split(CPU_CHUNK if images.device.type == "cpu" else len(images))

    def to(self, device: torch.device | str) -> Self:
        """Move to the device; returns itself."""
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """
        Raises:
            UserError: images are not uint8 (B, C, H, W), or the features not finite (B, d).
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UserError(f"expected uint8 images (B, C, H, W), got {images.dtype} of {tuple(images.shape)}")
        with torch.autocast(self.device.type, enabled=False), full_float32():
            features = self.extract(images.to(self.device)).float()
        if features.ndim != 2 or len(features) != len(images):
            raise UserError(f"{self.name} features of {len(images)} images have shape {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise UserError(f"{self.name} features of images {tuple(images.shape)} hold NaN or infinite values")
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
        module: put into evaluation mode; resizing and normalization are its own business.
        name: of the features: must say which network this is, since numbers are cited under it.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in ("inception", "pixels"):
            raise UserError(f"NetworkFeatures.name takes a-z, 0-9 and '_', not 'inception' or 'pixels', got {name!r}")
        self.module, self.name = module.eval(), name
        self._fingerprint = weights_digest(module.state_dict())

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def to(self, device: torch.device | str) -> Self:
        self.module.to(device)
        return super().to(device)

    def extract(self, images: Tensor) -> Tensor:
        return self.module(from_uint8(images))
