"""A random subset of a stream that does not depend on the order of the stream, or on which process saw which part."""

import hashlib

import torch
from torch import Tensor

from fmlit.core.processes import ProcessGroup


def image_keys(images: Tensor) -> Tensor:
    """(B,) int64 keys of uint8 images, from a hash of their bytes and shape."""
    keys = [
        int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8, key=str(image.shape).encode()).digest()) >> 1
        for image in images.cpu().numpy()
    ]
    return torch.tensor(keys, dtype=torch.int64)


class BottomKSample:
    """The ``capacity`` rows with the smallest keys, ordered by key: bottom-k sampling.

    With hashes for keys this is a uniform sample without replacement, and the same one for any order, batching and
    number of processes. Copies of one image share its key, and are kept or left out together. Rows are kept on the CPU.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self._held = capacity, 0
        self._keys: list[Tensor] = []
        self._rows: list[Tensor] = []

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, keys: Tensor, rows: Tensor) -> None:
        """Offer rows (B, d) under int64 keys (B,)."""
        self._keys.append(keys.cpu().clone())
        self._rows.append(rows.cpu().clone())
        self._held += len(keys)
        if self._held > 2 * self.capacity:  # seldom, so that sorting costs little
            self._prune()

    def _prune(self) -> None:
        if not self._keys:
            return
        keys, order = torch.cat(self._keys).sort(stable=True)
        self._keys = [keys[: self.capacity]]
        self._rows = [torch.cat(self._rows)[order[: self.capacity]]]
        self._held = len(self._keys[0])

    @property
    def rows(self) -> Tensor:
        """(k, d), k <= capacity; (0, 0) before the first update."""
        self._prune()
        return self._rows[0] if self._rows else torch.empty(0, 0)

    @torch.inference_mode(False)
    def reduce(self, ranks: ProcessGroup) -> "BottomKSample":
        """The sample of all ranks' rows together, the same on each; this object stays as it is."""
        total, rows = BottomKSample(self.capacity), self.rows
        keys = self._keys[0] if self._keys else torch.empty(0, dtype=torch.int64)
        total.update(ranks.gather_rows(keys), ranks.gather_rows(rows))
        return total
