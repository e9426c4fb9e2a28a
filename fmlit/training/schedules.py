"""The learning rate as a function of the images seen, so that it does not depend on the batch size."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from fmlit.core.errors import UserError

LONG_WARMUP = 1 / 4  # of a run
Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class LearningRateSchedule:
    """The learning rate over a run: a linear warm-up from 0, a constant part, then the decay.

    An optimizer step takes the rate in the middle of its images, so that even the first step learns.

    Args:
        images: run length in training images, where the decay ends. The command line takes it from ``images``.
        warmup_images: images over which the learning rate rises from 0.
        stable_images: images after the warm-up before the decay begins.
        decay: "constant" for no decay, or "linear" or "cosine" to 0 at ``images``.

    Raises:
        UserError: a number is out of range, or nothing is left of the run for the decay.
    """

    images: int = 1_000_000
    warmup_images: int = 0
    stable_images: int = 0
    decay: Decay = "constant"

    def __post_init__(self) -> None:
        if self.images < 1 or self.warmup_images < 0 or self.stable_images < 0:
            got = f"{self.images}, {self.warmup_images} and {self.stable_images}"
            rule = "images must be positive, warmup_images and stable_images not negative"
            raise UserError(f"model.schedule: {rule}, got {got}")
        if self.decay not in get_args(Decay):
            raise UserError(f"model.schedule: unknown decay {self.decay!r}: choose from {', '.join(get_args(Decay))}")
        if self.decay != "constant" and self.stable_images and self.warmup_images + self.stable_images >= self.images:
            stable = f"model.schedule: stable_images {self.stable_images:,}"
            left = f"nothing of the {self.images:,} images for the decay, after {self.warmup_images:,} for warm-up"
            raise UserError(f"{stable} leaves {left}: scale it with the run length")

    def warn_of_long_warmup(self) -> None:
        """Warn if the learning rate rises for more than a quarter of the run."""
        if self.warmup_images > self.images * LONG_WARMUP:
            rises = f"the learning rate rises over {self.warmup_images:,} images, and the run has {self.images:,}"
            remedy = f"it may learn little; try {max(1, self.images // 20):,}"
            rank_zero_warn(f"model.schedule.warmup_images: {rises}: {remedy}")

    def factor(self, images_seen: float) -> float:
        """The factor on the learning rate after ``images_seen`` images, in [0, 1]."""
        if images_seen < self.warmup_images:
            return images_seen / self.warmup_images
        if self.decay == "constant":
            return 1.0
        start = self.warmup_images + self.stable_images
        done = min(1.0, max(0, images_seen - start) / max(1, self.images - start))
        return 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
