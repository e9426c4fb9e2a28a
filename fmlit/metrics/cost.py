"""What scoring a set of images costs: time, the part of it that the features take, and memory."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fmlit.core.processes import ProcessGroup


@dataclass(frozen=True)
class Cost:
    """Of a set of images; of several ranks, each figure of the one that it is largest on.

    Attributes:
        images: their number, on all ranks.
        seconds: until the last image was seen: sampling or reading, and features.
        features: the part of these seconds that the features took.
        distances: seconds that followed, for the distances.
        memory: the most bytes that a process held at once: allocated on its GPU, or resident where there is none.
    """

    images: int
    seconds: float
    features: float
    distances: float
    memory: int

    def record(self) -> dict[str, float]:
        """Seconds per 1,000 images, in all and in the features; seconds for the distances; gigabytes."""
        thousands = self.images / 1000
        return {
            "seconds_per_1000": round(self.seconds / thousands, 3),
            "features_per_1000": round(self.features / thousands, 3),
            "distances_seconds": round(self.distances, 3),
            "peak_memory_gb": round(self.memory / 1e9, 3),
        }

    def __str__(self) -> str:
        of = self.record()
        return (
            f"{of['seconds_per_1000']:.3g} s per 1,000 images, of which features {of['features_per_1000']:.3g} s; "
            f"distances {of['distances_seconds']:.3g} s; peak memory {of['peak_memory_gb']:.2f} GB"
        )


class Meter:
    """Clock and memory of this process, from its construction on.

    Memory on a GPU is PyTorch's ``max_memory_allocated``, whose peak starts anew here. Without a GPU it is the resident
    set of the process: since here on Linux, since the process began on other systems.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[str, float] = {}
        _restart_peak(device)
        self._started = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else the next part would wait for this one's kernels
        return time.perf_counter()

    def lap(self, part: str) -> None:
        """Call ``part`` what has passed since the construction."""
        self.parts[part] = self._now() - self._started

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the time of the block to ``part``."""
        started = self._now()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + self._now() - started

    def cost(self, images: int, ranks: ProcessGroup) -> Cost:
        """Of ``images`` images; every rank must call it, and gets the same."""
        names = ("seconds", "features", "distances")
        of_ranks = ranks.gather_objects((*(self.parts.get(name, 0.0) for name in names), _peak(self.device)))
        seconds, features, distances, memory = (max(values) for values in zip(*of_ranks, strict=True))
        return Cost(images, seconds, features, distances, int(memory))


def _restart_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # of another system, or a closed /proc: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak of the resident set starts anew


def _peak(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):  # in KiB
            return int(line.split()[1]) * 1024
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
