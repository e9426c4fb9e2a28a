"""Shapes and ranges of tensors: times expanded to data, shape checks, and images to and from uint8."""

from collections.abc import Callable

import torch
from torch import Tensor

from fmlit.core.errors import UserError

# (x (B, *shape), t (B,)) -> like x. A diffusion coefficient may return anything that broadcasts to x.
Field = Callable[[Tensor, Tensor], Tensor]


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """Reshape ``t`` from (B,) to (B, 1, ..., 1), so that it multiplies ``x`` of shape (B, *shape) sample by sample.

    This is the only place where time is broadcast to data. Plain broadcasting would multiply a (B,) tensor along the
    last axis. That runs without an error whenever B equals the image width, and is wrong.

    Raises:
        UserError: t does not have shape (B,).
    """
    if t.ndim != 1 or t.shape[0] != x.shape[0]:
        raise UserError(f"t must have shape ({x.shape[0]},) for x of shape {tuple(x.shape)}, got {tuple(t.shape)}")
    return t.reshape(-1, *(1,) * (x.ndim - 1))


def check_like(x: Tensor, like: Tensor, what: str) -> None:
    """Raise a UserError that names ``what`` unless both tensors have the same shape, to prevent silent broadcasting."""
    if x.shape != like.shape:
        raise UserError(f"{what} must have the same shape, got {tuple(x.shape)} and {tuple(like.shape)}")


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8. Values are clamped and rounded to the nearest level.

    Raises:
        UserError: the images are integers, or a value is NaN or infinite. A cast would make it an ordinary gray level.
    """
    if not images.is_floating_point():
        raise UserError(f"expected images in [-1, 1] as floating-point numbers, got {images.dtype}")
    if not torch.isfinite(images).all():
        raise UserError(f"images of shape {tuple(images.shape)} hold NaN or infinite values")
    return images.float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]."""
    if images.dtype != torch.uint8:
        raise UserError(f"expected uint8 images, got {images.dtype}")
    return images.float().div(127.5).sub(1.0)
