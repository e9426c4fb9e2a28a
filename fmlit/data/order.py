"""The order in which training sees the data: one global stream, the same for any number of processes.

Position p of the stream (p = images seen) is image ``permutation_e[p mod N]`` with epoch ``e = p // N``. Batches run on
across the border of two epochs, so that every image is seen once per epoch, with nothing dropped and nothing padded;
and since the position is all there is to know, a run resumes from the number of images it has seen.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

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
        self.length, self.seed = length, seed
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


class RankSlice(NamedTuple):
    """What one process takes of a global micro-batch: slice ``rank`` of ``world_size`` slices of ``size`` images."""

    size: int
    rank: int
    world_size: int

    def of(self, batch: Tensor) -> Tensor:
        """This rank's rows of a tensor that belongs to the whole micro-batch."""
        return batch[self.rank * self.size : (self.rank + 1) * self.size]


class GlobalBatchSampler(Sampler[list[tuple[int, bool]]]):
    """One rank's slice of each global micro-batch, for ever: lists of (index, flip) pairs.

    A global micro-batch is the next ``size * world_size`` positions of the stream. Flips are drawn for the whole
    micro-batch and sliced in the same way.

    Args:
        order: the stream.
        part: the slice of this rank.
        horizontal_flip: flip each image with probability 1/2.
        images_seen: gives the position to start from. It is called at the start of every iteration, so that a second
            iteration (another Lightning epoch, a resumed run) continues where training stands.
    """

    def __init__(
        self, order: TrainingOrder, part: RankSlice, horizontal_flip: bool, images_seen: Callable[[], int]
    ) -> None:
        self.order, self.part, self.horizontal_flip, self.images_seen = order, part, horizontal_flip, images_seen

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        position, total = self.images_seen(), self.part.size * self.part.world_size
        while True:
            indices = self.order.indices(position + self.part.rank * self.part.size, self.part.size)
            flips = torch.zeros(total, dtype=torch.bool)
            if self.horizontal_flip:
                generator = training_generator(self.order.seed, position, "flip")
                flips = torch.randint(2, (total,), generator=generator).bool()
            yield list(zip(indices.tolist(), self.part.of(flips).tolist(), strict=True))
            position += total
