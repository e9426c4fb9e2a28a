"""Random draws that depend on what is drawn, not on who draws it, or when.

* Training: every draw of a global batch comes from a generator keyed by ``(seed, images_seen, stream)``; each rank
  takes its slice of it. Nothing needs saving, resuming is exact, and no two ranks or accumulation steps share noise.
* Sampling: every image owns its noise, keyed by its own seed, so that image i does not depend on the batch it was
  drawn in, on the number of processes, or on the device.
"""

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fmlit.core.errors import UserError

VALUES_PER_THREAD = 250_000  # a few milliseconds; starting a thread takes a tenth of one


def key(seed: int, *parts: int | str) -> int:
    """A 63-bit key of a seed and what it is for."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def training_generator(seed: int, images_seen: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one stream ("time", "noise", "labels", "flip", ...) of the global batch at ``images_seen``."""
    return torch.Generator(device).manual_seed(key(seed, images_seen, stream))


def seed_layers(number: int, device: torch.device) -> None:
    """Seed what dropout draws from on this device. ``torch.manual_seed`` does it for all devices, and takes 0.1 ms."""
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(number)
        return
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(number)


def image_seeds(seed: int, indices: Sequence[int] | Tensor) -> Tensor:
    """Seeds of images ``indices`` of the collection ``seed``: int64 (B,), distinct for all indices below 2^32."""
    if not 0 <= seed < 2**31:
        raise UserError(f"seed must lie in [0, 2^31), got {seed}")
    return torch.as_tensor(indices, dtype=torch.int64) + (seed << 32)


def image_noise(seeds: Tensor, shape: Sequence[int], stream: str = "init", step: int = 0) -> Tensor:
    """Standard normal noise (B, *shape) in float32 on the CPU; row i depends on ``seeds[i]``, stream and step only.

    Philox is counter-based: the key is used as it is, so different seeds cannot collide (torch's CPU generator keeps
    32 bits of a seed, with which 50,000 images would share noise once in four runs).
    """
    noise = torch.empty(len(seeds), *shape, dtype=torch.float32)
    rows, numbers, purpose = noise.reshape(len(seeds), math.prod(shape)).numpy(), seeds.tolist(), key(step, stream)
    threads = min(torch.get_num_threads(), 1 + noise.numel() // VALUES_PER_THREAD)

    def fill(part: int) -> None:
        _fill(rows[part::threads], numbers[part::threads], purpose)

    if threads == 1:
        fill(0)
    else:  # numpy draws without Python's lock
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(threads)))
    return noise


def _fill(rows: np.ndarray, seeds: Sequence[int], purpose: int) -> None:
    """Each row as ``Generator(Philox(key=[seed, purpose]))`` draws it; making these takes longer than to draw."""
    philox = np.random.Philox(key=np.array([0, purpose], dtype=np.uint64))
    generator, fresh = np.random.Generator(philox), philox.state
    for row, seed in zip(rows, seeds, strict=True):
        fresh["state"]["key"][0] = seed
        philox.state = fresh
        generator.standard_normal(out=row, dtype=np.float32)
