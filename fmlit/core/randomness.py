"""Random draws that depend on what is drawn, and not on which process draws it, or when.

* In training, every draw of a global batch comes from a generator keyed by ``(seed, images_seen, stream)``. Each rank
  takes its slice, and draws little more of the noise than that. No generator state is saved, resuming is exact, and no
  two ranks or accumulated batches share noise.
* In sampling, every image owns its noise, which is keyed by the seed of the image. So image i does not depend on its
  batch, on the number of processes, or on the device.
"""

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fmlit.core.errors import UserError

VALUES_PER_THREAD = 250_000  # takes a few milliseconds, and starting a thread a tenth of one


def key(seed: int, *parts: int | str) -> int:
    """Hash a seed and its purpose to a 63-bit key."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def training_generator(seed: int, images_seen: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one stream ("time", "noise", "labels", "flip", ...) of the global batch at ``images_seen``."""
    return torch.Generator(device).manual_seed(key(seed, images_seen, stream))


def seed_layers(number: int, device: torch.device) -> None:
    """Seed the generator that dropout uses on this device. ``torch.manual_seed`` seeds all devices and takes 0.1 ms."""
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(number)
        return
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(number)


def image_seeds(seed: int, indices: Sequence[int] | Tensor) -> Tensor:
    """The seeds of images ``indices`` in the collection ``seed``: int64 (B,), distinct for all indices below 2^32."""
    if not 0 <= seed < 2**31:
        raise UserError(f"seed must lie in [0, 2^31), got {seed}")
    return torch.as_tensor(indices, dtype=torch.int64) + (seed << 32)


def image_noise(seeds: Tensor, shape: Sequence[int], stream: str = "init", step: int = 0) -> Tensor:
    """Draw standard normal noise (B, *shape), float32 on the CPU. Row i depends only on ``seeds[i]``, stream and step.

    Philox is counter-based and uses the whole key, so different seeds cannot collide. Torch's CPU generator keeps only
    32 bits of a seed. With it, two of 50,000 images would share their noise in one of four runs.
    """
    noise = torch.empty(len(seeds), *shape, dtype=torch.float32)
    rows, numbers, purpose = noise.reshape(len(seeds), math.prod(shape)).numpy(), seeds.tolist(), key(step, stream)
    threads = min(torch.get_num_threads(), 1 + noise.numel() // VALUES_PER_THREAD)

    def fill(part: int) -> None:
        _fill(rows[part::threads], numbers[part::threads], purpose)

    if threads == 1:
        fill(0)
    else:  # numpy releases the global interpreter lock
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(threads)))
    return noise


def _fill(rows: np.ndarray, seeds: Sequence[int], purpose: int) -> None:
    """Fill each row as ``Generator(Philox(key=[seed, purpose]))`` would. One generator is reseeded to save time."""
    philox = np.random.Philox(key=np.array([0, purpose], dtype=np.uint64))
    generator, fresh = np.random.Generator(philox), philox.state
    for row, seed in zip(rows, seeds, strict=True):
        fresh["state"]["key"][0] = seed
        philox.state = fresh
        generator.standard_normal(out=row, dtype=np.float32)
