"""The order in which training sees the data: one global stream, the same for any number of processes.

Position p of the stream (p = images seen) is image ``permutation_e[p mod N]`` with epoch ``e = p // N``. Batches run on
across the border of two epochs, so that every image is seen once per epoch, with nothing dropped and nothing padded;
and since the position is all there is to know, a run resumes from the number of images it has seen.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fmlit.core.errors import UserError
from fmlit.core.randomness import key, training_generator


class TrainingOrder:
    """The infinite sequence of image indices that ``seed`` gives for a data set of ``length`` images."""

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise UserError(f"a data set needs at least one item to train on, got {length}")
        self.length = length
        self.seed = seed
        self._cached: tuple[int, Tensor] | None = None

    def indices(self, start: int, count: int) -> Tensor:
        """int64 (count,): the images at positions ``start`` ... ``start + count - 1``, from any number of epochs."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(start, self.length)
            piece = self._permutation(epoch)[offset : offset + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _permutation(self, epoch: int) -> Tensor:
        if self._cached is None or self._cached[0] != epoch:
            generator = torch.Generator().manual_seed(key(self.seed, "order", epoch))
            self._cached = epoch, torch.randperm(self.length, generator=generator)
        return self._cached[1]


class GlobalBatchSampler(Sampler[list[tuple[int, bool]]]):
    """One rank's share of each global micro-batch, for ever: lists of (index, flip) pairs.

    A global micro-batch is the next ``share * world_size`` positions of the stream, and rank r takes the slice
    ``[r * share, (r + 1) * share)``. Flips are drawn for the whole micro-batch and sliced in the same way.

    Args:
        order: the stream.
        share: images per rank and micro-batch.
        rank: this process, from 0 to world_size - 1.
        world_size: number of processes.
        horizontal_flip: flip each image with probability 1/2.
        images_seen: gives the position to start from. Asked at the start of every iteration, so that a second
            iteration (another Lightning epoch, a resumed run) goes on where training stands.
    """

    def __init__(
        self,
        order: TrainingOrder,
        share: int,
        rank: int,
        world_size: int,
        horizontal_flip: bool,
        images_seen: Callable[[], int],
    ) -> None:
        self.order = order
        self.share = share
        self.rank = rank
        self.world_size = world_size
        self.horizontal_flip = horizontal_flip
        self.images_seen = images_seen

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        position = self.images_seen()
        while True:
            indices = self.order.indices(position + self.rank * self.share, self.share)
            yield list(zip(indices.tolist(), self._flips(position).tolist(), strict=True))
            position += self.share * self.world_size

    def _flips(self, position: int) -> Tensor:
        """bool (share,): which of this rank's images to flip in the micro-batch that starts at ``position``."""
        if not self.horizontal_flip:
            return torch.zeros(self.share, dtype=torch.bool)
        generator = training_generator(self.order.seed, position, "flip")
        flips = torch.randint(2, (self.share * self.world_size,), generator=generator).bool()
        return flips[self.rank * self.share : (self.rank + 1) * self.share]
