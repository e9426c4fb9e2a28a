"""CIFAR-10, through torchvision."""

from functools import cached_property
from pathlib import Path

import torch

from fmlit.data.data_module import DataModule, Split
from fmlit.data.downloads import OfficialFiles
from fmlit.data.stores import InMemoryDataset


class CIFAR10(DataModule):
    """32x32 colour images of ten classes (Krizhevsky 2009): 50,000 to train on, 10,000 test images.

    Args:
        root: Folder that holds cifar-10-batches-py, as in torchvision. It may be read-only when the files are there.
        batch_size: Images per optimiser step, over all ranks and all accumulated batches.
        seed: Seed of the order in which training sees the images, and of their flips.
        download: Fetch the files (170 MB) when they are missing.
        horizontal_flip: Mirror training images left to right with probability 1/2.
    """

    shape = (3, 32, 32)

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        seed: int = 0,
        download: bool = True,
        horizontal_flip: bool = True,
    ) -> None:
        super().__init__(batch_size, seed)
        self.root = root
        self.download = download
        self.horizontal_flip = horizontal_flip
        self.class_names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        if not download:
            self._files.check_folder()

    @cached_property
    def _files(self) -> OfficialFiles:
        from torchvision.datasets import CIFAR10 as Published

        meta = Published.meta["filename"], Published.meta["md5"]
        checksums = dict([*Published.train_list, *Published.test_list, meta])
        return OfficialFiles("CIFAR-10", Path(self.root), Published.base_folder, checksums, "md5")

    def prepare_data(self) -> None:
        """Download what is missing. Lightning calls this in one process per node."""
        if self.download:
            self._files.download_missing(_download)

    def load(self, split: Split) -> InMemoryDataset:
        from torchvision.datasets import CIFAR10 as Published

        try:
            published = Published(self.root, train=split == "train")  # compares MD5 sums before it unpickles
        except RuntimeError:
            self._files.check()  # says which file it is
            raise
        images = torch.from_numpy(published.data).permute(0, 3, 1, 2)
        return InMemoryDataset(images, torch.tensor(published.targets, dtype=torch.int64))


def _download(root: Path) -> None:
    from torchvision.datasets import CIFAR10 as Published

    Published(root, download=True)
