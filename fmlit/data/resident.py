"""A data set that lies on the training device: batches are gathered and flipped there, and only row numbers travel."""

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from fmlit.data.stores import InMemoryDataset

SHARE = 0.25  # of the free memory that a data set may take; the rest is the network's


class ResidentDataset(Dataset[dict[str, Tensor]]):
    """A copy of a data set on a device. A loader reads rows and flips from it, and ``take`` turns them into a batch.

    Holds the same images in the same order as ``TrainingView``: where the data lie changes nothing that is learnt.
    """

    def __init__(self, dataset: InMemoryDataset, device: torch.device) -> None:
        self.data, self.labels = dataset.data.to(device), dataset.labels.to(device)

    def __getitems__(self, items: list[tuple[int, bool]]) -> dict[str, Tensor]:
        """``{"rows": int64 (B,), "flips": bool (B,)}``, on the CPU."""
        rows, flips = zip(*items, strict=True)
        return {"rows": torch.tensor(rows), "flips": torch.tensor(flips)}

    def take(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``{"data": (B, *shape), "labels": (B,)}`` of rows and flips that are on the device."""
        data = self.data.index_select(0, batch["rows"])
        if data.ndim == 4:  # without a question to the device whether any is to be flipped
            data = torch.where(batch["flips"][:, None, None, None], data.flip(-1), data)
        return {"data": data, "labels": self.labels.index_select(0, batch["rows"])}


def resident(dataset: object, device: torch.device) -> ResidentDataset | None:
    """The data set on an accelerator, or None where there is none, its items are files, or there is no room for it."""
    if device.type == "cpu" or not isinstance(dataset, InMemoryDataset):
        return None
    size, free = dataset.data.nbytes + dataset.labels.nbytes, _free_memory(device)
    if size <= SHARE * free:
        return ResidentDataset(dataset, device)
    rank_zero_warn(
        f"the data ({size / 1e9:.1f} GB) stay in host memory: more than a quarter of the {free / 1e9:.1f} GB that are "
        f"free on {device}"
    )
    return None


def _free_memory(device: torch.device) -> float:
    """Bytes; unlimited where the device does not tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")
