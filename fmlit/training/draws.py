"""The random draws of a training step: noise, times, dropped labels, and which noise goes with which data point."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmlit.core import randomness
from fmlit.core.errors import UserError
from fmlit.flows.couplings import Coupling, IndependentCoupling
from fmlit.flows.times import Limits, TimeDistribution, UniformTime
from fmlit.models.generative_model import GenerativeModel

GRAIN = 32  # rows of a global batch that share a generator of noise


@dataclass(frozen=True)
class GlobalBatch:
    """A batch over all ranks, of which each rank holds a slice.

    Times and dropped labels are drawn for the whole batch from generators keyed by ``(seed, images_seen, stream)``, and
    each rank takes its slice. Noise is large. It has a generator for every ``GRAIN`` rows of the batch, and each rank
    draws only the grains that it needs. So there is no state to save, and no two ranks share noise.

    Attributes:
        seed: seed of the run.
        images_seen: training images before this batch.
        share: rows that each rank holds.
        rank: this rank.
        world_size: number of ranks.
        device: where to draw.
    """

    seed: int
    images_seen: int
    share: int
    rank: int
    world_size: int
    device: torch.device

    @property
    def size(self) -> int:
        """The rows of all ranks."""
        return self.share * self.world_size

    @property
    def mine(self) -> slice:
        """The rows of this rank."""
        return slice(self.rank * self.share, (self.rank + 1) * self.share)

    def generator(self, stream: str) -> torch.Generator:
        """A generator that is the same on every rank."""
        return randomness.training_generator(self.seed, self.images_seen, stream, self.device)

    def noise(self, shape: Sequence[int]) -> Tensor:
        """This rank's rows of standard normal noise, (share, *shape)."""
        first, end = self.mine.start // GRAIN * GRAIN, min(self.size, -(-self.mine.stop // GRAIN) * GRAIN)
        noise = torch.empty(end - first, *shape, device=self.device)
        for row in range(first, end, GRAIN):
            grain = noise[row - first : row - first + GRAIN]
            torch.randn(grain.shape, generator=self.generator(f"noise {row}"), out=grain)
        return noise[self.mine.start - first :][: self.share]

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks, given those of this one. A collective call."""
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)


@dataclass(frozen=True)
class TrainingDraws:
    """What a training step draws at random.

    Args:
        time_distribution: distribution of the training times.
        coupling: how data and noise are paired within a batch.
        label_drop: probability with which a sample's label is replaced by the null label.

    Raises:
        UserError: label_drop is not a probability.
    """

    time_distribution: TimeDistribution = UniformTime()
    coupling: Coupling = IndependentCoupling()
    label_drop: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_drop <= 1:
            raise UserError(f"model.draws.label_drop must be a probability in [0, 1], got {self.label_drop}")

    def draw(
        self, batch: GlobalBatch, model: GenerativeModel, limits: Limits, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw this rank's noise (B, *shape) and times (B,) within the limits, and drop some of its labels (B,)."""
        mine, device = batch.mine, batch.device
        eps = batch.noise(model.shape)
        t = self.time_distribution.sample(batch.size, batch.generator("time"), limits)[mine]
        if labels is not None and model.null_label is not None and self.label_drop > 0:
            dropped = torch.rand(batch.size, generator=batch.generator("labels"), device=device)[mine] < self.label_drop
            labels = torch.where(dropped, model.null_label, labels)
        return eps, t, labels

    def couple(self, batch: GlobalBatch, z: Tensor, eps: Tensor, labels: Tensor | None) -> Tensor:
        """Reorder this rank's noise ``eps`` (B, *shape) to pair it with its data ``z`` (B, *shape)."""
        if not self.coupling.across_ranks or batch.world_size == 1:
            return self.coupling(z, eps, labels)
        gathered = None if labels is None else batch.gather(labels)
        return self.coupling(batch.gather(z), batch.gather(eps), gathered)[batch.mine]
