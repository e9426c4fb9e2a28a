"""Vectors whose distribution is known: what a model has learned from them can be compared with the truth."""

from abc import abstractmethod

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.randomness import key
from fmlit.data.data_module import DataModule, Split
from fmlit.data.stores import InMemoryDataset


class ToyData(DataModule):
    """Draws from a known distribution, the same for the same seed; the test split is drawn anew."""

    def __init__(self, samples: int = 10_000, batch_size: int = 128, seed: int = 0) -> None:
        super().__init__(batch_size, seed)
        if samples < 1:
            raise UserError(f"samples must be at least 1, got {samples}")
        self.samples = samples

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Tensor:
        """float32 (samples, *shape)."""

    def load(self, split: Split) -> InMemoryDataset:
        generator = torch.Generator().manual_seed(key(self.seed, "toy", split))
        return InMemoryDataset(self.draw(generator))


class TwoPoints(ToyData):
    """The numbers -2 and +2 in turn: the mixture of two Diracs, with weights of exactly 1/2 for even ``samples``.

    Args:
        samples: Number of points.
        batch_size: Points per optimizer step, over all ranks and all accumulated batches.
        seed: Seed of the order in which training sees the points.
    """

    shape = (1,)

    def draw(self, generator: torch.Generator) -> Tensor:
        return torch.tensor([-2.0, 2.0])[torch.arange(self.samples) % 2, None]


class Moons(ToyData):
    """Two interleaved half circles of radius 1 in the plane, as in scikit-learn.

    Args:
        samples: Number of points.
        batch_size: Points per optimizer step, over all ranks and all accumulated batches.
        seed: Seed of the points and of the order in which training sees them.
        noise: Standard deviation of the Gaussian noise around the half circles.
    """

    shape = (2,)

    def __init__(self, samples: int = 10_000, batch_size: int = 128, seed: int = 0, noise: float = 0.05) -> None:
        super().__init__(samples, batch_size, seed)
        if noise < 0:
            raise UserError(f"noise must not be negative, got {noise}")
        self.noise = noise

    def draw(self, generator: torch.Generator) -> Tensor:
        from sklearn.datasets import make_moons

        random_state = int(torch.randint(2**31, (), generator=generator))
        points, _ = make_moons(self.samples, noise=self.noise, random_state=random_state)
        return torch.from_numpy(points).float()


class Checkerboard(ToyData):
    """Uniform on the eight dark squares of a 4x4 board that covers [-2, 2] x [-2, 2].

    Args:
        samples: Number of points.
        batch_size: Points per optimizer step, over all ranks and all accumulated batches.
        seed: Seed of the points and of the order in which training sees them.
    """

    shape = (2,)

    def draw(self, generator: torch.Generator) -> Tensor:
        row = torch.randint(4, (self.samples,), generator=generator)
        column = 2 * torch.randint(2, (self.samples,), generator=generator) + row % 2
        corner = torch.stack([column, row], dim=1) - 2
        return corner + torch.rand(self.samples, 2, generator=generator)
