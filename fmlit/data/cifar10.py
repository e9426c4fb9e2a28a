"""CIFAR-10, through torchvision."""

from functools import cached_property

import torch

from fmlit.data.data_module import Split
from fmlit.data.downloads import OfficialFiles, PublishedData
from fmlit.data.stores import InMemoryDataset


class CIFAR10(PublishedData):
    """32x32 color images of ten classes (Krizhevsky 2009): 50,000 to train on, 10,000 test images.

    Args:
        root: Folder that holds cifar-10-batches-py, as in torchvision. It may be read-only when the files are there.
        batch_size: Images per optimizer step, over all ranks and all accumulated batches.
        seed: Seed of the order in which training sees the images, and of their flips.
        download: Fetch the files (170 MB) when they are missing.
        horizontal_flip: Mirror training images left to right with probability 1/2.
    """

    shape = (3, 32, 32)
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    torchvision_name = "CIFAR10"

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        seed: int = 0,
        download: bool = True,
        horizontal_flip: bool = True,
    ) -> None:
        super().__init__(root, batch_size, seed, download)
        self.horizontal_flip = horizontal_flip

    @cached_property
    def files(self) -> OfficialFiles:
        published = self.published
        meta = published.meta["filename"], published.meta["md5"]
        checksums = dict([*published.train_list, *published.test_list, meta])
        return OfficialFiles("CIFAR-10", self.folder, published.base_folder, checksums, "md5")

    def load(self, split: Split) -> InMemoryDataset:
        try:
            data = self.published(self.folder, train=split == "train")  # compares MD5 sums before it unpickles
        except RuntimeError:
            self.files.check()  # names the file
            raise
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
        return InMemoryDataset(images, torch.tensor(data.targets, dtype=torch.int64))
