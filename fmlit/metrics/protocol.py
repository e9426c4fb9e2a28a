"""The protocol of a number: everything that must be equal before two of them may be compared."""

import re
from dataclasses import dataclass

from fmlit.core.errors import UserError

_PART = re.compile(r"[A-Za-z0-9_.+]*")


def count_label(n: int) -> str:
    """5000 as "5k", 1001 as "1001"."""
    return f"{n // 1000}k" if n >= 1000 and n % 1000 == 0 else str(n)


def metric_key(metric: str, features: str, n: int) -> str:
    """The name of a metric on n images: ``fid_5k``, ``kid_5k``, ``recall_5k`` are numbers on Inception features.

    Other features carry their own name, and the Fréchet and kernel distances on them are not an "inception distance":
    ``fd_pixels_1k``, ``kd_pixels_1k``, ``recall_pixels_1k``.
    """
    if features != "inception":
        metric = f"{ {'fid': 'fd', 'kid': 'kd'}.get(metric, metric) }_{features}"
    return f"{metric}_{count_label(n)}"


@dataclass(frozen=True)
class Protocol:
    """How a Fréchet distance was measured; ``str()`` is what is logged and cited.

    ``fid50k-train-tf1resize-uint8-ema-heun18``: 50,000 images, against the training split without flips, by the
    Inception network of 2015 with TensorFlow 1's resize, images clamped and rounded to uint8, averaged weights, 18
    steps of Heun. Features are float32 outside autocast (no TF32) and statistics float64, always.

    Args:
        features: name of the features, e.g. "inception" or "pixels".
        n: number of generated images.
        split: of the data set, against which is measured; or the name of a reference file.
        preprocessing: what the features do to an image first; empty for nothing.
        flip: whether the reference holds every image's mirror image as well.
        weights: which weights of the model drew the images ("ema", "raw"); empty for images of unknown origin.
        sampler: how they were drawn ("heun18", "unipc10+cfg1.5"); empty for images of unknown origin.
    """

    features: str
    n: int
    split: str
    preprocessing: str = ""
    flip: bool = False
    weights: str = ""
    sampler: str = ""

    def __post_init__(self) -> None:
        for field in ("features", "split", "preprocessing", "weights", "sampler"):
            value = getattr(self, field)
            if not _PART.fullmatch(value):  # a dash would make the string ambiguous
                raise UserError(f"Protocol.{field} takes letters, digits and any of '_.+', got {value!r}")
        if self.n < 1:
            raise UserError(f"Protocol.n must be positive, got {self.n}")

    def __str__(self) -> str:
        metric = "fid" if self.features == "inception" else f"fd{self.features}"
        separator = "-" if metric[-1].isdigit() else ""
        split = self.split + ("+flip" if self.flip else "")
        parts = [f"{metric}{separator}{count_label(self.n)}", split, self.preprocessing, "uint8"]
        return "-".join(part for part in [*parts, self.weights, self.sampler] if part)
