"""MNIST, through torchvision, with the check of its contents that torchvision leaves out."""

from pathlib import Path

from fmlit.data.data_module import DataModule, Split
from fmlit.data.downloads import OfficialFiles
from fmlit.data.stores import InMemoryDataset

# Of the unpacked files. torchvision knows sums of the archives only, and takes whatever lies under an unpacked name.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class MNIST(DataModule):
    """28x28 grey handwritten digits (LeCun et al. 1998): 60,000 to train on, 10,000 test images.

    Args:
        root: Folder that holds MNIST/raw, as in torchvision. It may be read-only when the files are there.
        batch_size: Images per optimiser step, over all ranks and all accumulated batches.
        seed: Seed of the order in which training sees the images.
        download: Fetch the files (12 MB) when they are missing.
    """

    shape = (1, 28, 28)

    def __init__(self, root: str = "data", batch_size: int = 128, seed: int = 0, download: bool = True) -> None:
        super().__init__(batch_size, seed)
        self.root = root
        self.download = download
        self.class_names = [str(digit) for digit in range(10)]
        self._files = OfficialFiles("MNIST", Path(root), "MNIST/raw", SHA256, "sha256")
        if not download:
            self._files.check_folder()

    def prepare_data(self) -> None:
        """Download what is missing. Lightning calls this in one process per node."""
        if self.download:
            self._files.download_missing(_download)

    def load(self, split: Split) -> InMemoryDataset:
        from torchvision.datasets.mnist import read_image_file, read_label_file

        part = "train" if split == "train" else "t10k"
        images, labels = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
        self._files.check([images, labels])
        folder = self._files.folder
        return InMemoryDataset(
            read_image_file(str(folder / images))[:, None],
            read_label_file(str(folder / labels)),
        )


def _download(root: Path) -> None:
    from torchvision.datasets import MNIST as Published

    Published(root, download=True)
