"""``DataModule``: what every data set has in common. A new one states its shape and classes and writes ``load``."""

import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, default_convert

from fmlit.core.errors import UserError
from fmlit.core.internals import replaces_sampler
from fmlit.core.tensors import from_uint8
from fmlit.core.workers import WatchedLoader
from fmlit.data.order import GlobalBatchSampler, RankSlice, TrainingOrder
from fmlit.data.resident import ResidentDataset, resident
from fmlit.data.stores import LabeledDataset, TrainingView

Split = Literal["train", "test"]


class DataModule(LightningDataModule, ABC):
    """A data set that deals one global, shuffled, endless stream of batches to all ranks.

    The order depends on the seed alone: not on the number of processes, not on gradient accumulation, not on whether
    the run was interrupted (see `fmlit.data.order`).

    Args:
        batch_size: Images per optimizer step, over all ranks and all accumulated batches.
        seed: Seed of the order and of the flips.
    """

    shape: tuple[int, ...]  # of one item: (C, H, W) for images, (D,) for vectors
    class_names: Sequence[str] | None = None  # by class id; None for data without classes
    horizontal_flip: bool = False
    num_workers: int = 0  # in memory, a batch is one indexing operation: worker processes would only copy it

    def __init__(self, batch_size: int = 128, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size, self.seed = batch_size, seed
        self._datasets: dict[Split, LabeledDataset] = {}
        self._resident: ResidentDataset | None = None

    @abstractmethod
    def load(self, split: Split) -> LabeledDataset:
        """Read the items of one split. Called once per split and process, possibly at the same time on many ranks."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for data without classes, whose labels are all 0."""
        return None if self.class_names is None else len(self.class_names)

    @property
    def title(self) -> str:
        """What a run says of its data when it starts."""
        return type(self).__name__

    def dataset(self, split: Split) -> LabeledDataset:
        """The unaugmented items of a split in their fixed order: pairs of uint8 image or float vector, and class id."""
        if split not in get_args(Split):
            raise UserError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
        if split not in self._datasets:
            self._datasets[split] = self.load(split)
        return self._datasets[split]

    def fingerprint(self, split: Split) -> str:
        """16 hexadecimal digits that change when the items do: a cache key for what is computed from them."""
        return self.dataset(split).fingerprint()

    def identity(self) -> dict[str, Any]:
        """What tells these training items from others: their number, and a fingerprint. A run keeps it."""
        dataset = self.dataset("train")
        known = isinstance(dataset, LabeledDataset)  # what somebody's own ``load`` returns may have no fingerprint
        return {"items": len(dataset), "fingerprint": dataset.fingerprint() if known else None}

    def train_dataloader(self) -> DataLoader:
        """Endless batches ``{"data": (share, *shape), "labels": int64 (share,)}``, starting where training stands.

        Images are uint8 until `on_after_batch_transfer`. Without a trainer, the loader of a single process. Where the
        data fit on the accelerator they are copied there, and batches hold rows and flips until then.

        Raises:
            UserError: see ``rank_slice``.
        """
        part, dataset = self.rank_slice(), self.dataset("train")
        order = TrainingOrder(len(dataset), self.seed)
        sampler = GlobalBatchSampler(order, part, self.horizontal_flip, self._images_seen)
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        self._resident = resident(dataset, device)
        return WatchedLoader(
            self._resident or TrainingView(dataset),
            batch_sampler=sampler,
            collate_fn=default_convert,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_ignore_signals,
            pin_memory=device.type == "cuda" and self._resident is None,
            generator=torch.Generator().manual_seed(self.seed),  # else each start takes a draw from the global one
        )

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Images to float32 in [-1, 1], on the device; vectors as they are."""
        if "rows" in batch:
            assert self._resident is not None  # whose rows they are
            batch = self._resident.take(batch)
        data = batch["data"]
        return {**batch, "data": from_uint8(data) if data.dtype == torch.uint8 else data}

    def _images_seen(self) -> int:
        module = None if self.trainer is None else self.trainer.lightning_module
        return int(getattr(module, "images_seen", 0))

    def rank_slice(self) -> RankSlice:
        """This process's part of a global micro-batch.

        Raises:
            UserError: batch_size cannot be split evenly, or Lightning would put a sampler of its own in place of ours.
        """
        trainer: Any = self.trainer
        if trainer is None:
            return RankSlice(self.batch_size, 0, 1)
        world_size, accumulated = trainer.world_size, trainer.accumulate_grad_batches
        # Lightning's own error names a sampler that the user has never seen.
        if world_size > 1 and replaces_sampler(trainer):
            raise UserError(
                "pass Trainer(use_distributed_sampler=False): the data module already deals images to the "
                f"{world_size} processes"
            )
        parts = world_size * accumulated
        if self.batch_size % parts:
            below = self.batch_size // parts * parts
            choices = f"{below} or {below + parts}" if below else f"{parts}"
            raise UserError(
                f"batch_size {self.batch_size} is not divisible by {parts} ({world_size} processes x "
                f"{accumulated} accumulated batches): choose {choices}"
            )
        return RankSlice(self.batch_size // parts, trainer.global_rank, world_size)


def _ignore_signals(worker: int) -> None:
    """A job or a terminal sends its signals to all processes, and training needs the workers until it has saved.

    They end with the process that started them.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
