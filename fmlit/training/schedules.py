"""The course of the learning rate over a run, in images: the same for every batch size."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fmlit.core.errors import UserError

Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class RateSchedule:
    """Linear warm-up from 0, a constant part, then the decay.

    Args:
        images: run length; the decay ends there.
        warmup_images: images of the warm-up.
        stable_images: images after it before the decay.
        decay: "constant" for none, or "linear" or "cosine" to 0.
    """

    images: int
    warmup_images: int = 0
    stable_images: int = 0
    decay: Decay = "constant"

    def __post_init__(self) -> None:
        if self.images < 1 or self.warmup_images < 0 or self.stable_images < 0:
            given = f"{self.images}, {self.warmup_images} and {self.stable_images}"
            raise UserError(f"images must be positive, warmup_images and stable_images not negative, got {given}")
        if self.decay not in get_args(Decay):
            raise UserError(f"unknown decay {self.decay!r}: choose from {', '.join(get_args(Decay))}")
        if self.decay != "constant" and self.stable_images and self.warmup_images + self.stable_images >= self.images:
            raise UserError(
                f"stable_images {self.stable_images:,} leaves nothing of the {self.images:,} images for the decay, "
                f"after {self.warmup_images:,} for warm-up: scale it with the run length"
            )

    def factor(self, images_seen: int) -> float:
        """The share of the learning rate that is used after ``images_seen`` images."""
        if images_seen < self.warmup_images:
            return images_seen / self.warmup_images
        if self.decay == "constant":
            return 1.0
        start = self.warmup_images + self.stable_images
        done = min(1.0, max(0, images_seen - start) / max(1, self.images - start))
        return 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
