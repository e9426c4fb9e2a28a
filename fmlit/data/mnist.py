"""MNIST, through torchvision, with the check of its contents that torchvision leaves out."""

from functools import cached_property

from fmlit.data.data_module import Split
from fmlit.data.downloads import OfficialFiles, PublishedData
from fmlit.data.stores import InMemoryDataset

# Of the unpacked files. torchvision knows sums of the archives only, and takes whatever lies under an unpacked name.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class MNIST(PublishedData):
    """28x28 gray handwritten digits (LeCun et al. 1998): 60,000 to train on, 10,000 test images.

    Args:
        root: Folder that holds MNIST/raw, as in torchvision. It may be read-only when the files are there.
        batch_size: Images per optimizer step, over all ranks and all accumulated batches.
        seed: Seed of the order in which training sees the images.
        download: Fetch the files (12 MB) when they are missing.
    """

    shape = (1, 28, 28)
    class_names = tuple("0123456789")
    torchvision_name = "MNIST"

    @cached_property
    def files(self) -> OfficialFiles:
        return OfficialFiles("MNIST", self.folder, "MNIST/raw", SHA256, "sha256")

    def load(self, split: Split) -> InMemoryDataset:
        from torchvision.datasets.mnist import read_image_file, read_label_file

        part = "train" if split == "train" else "t10k"
        images, labels = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
        self.files.check([images, labels])
        folder = str(self.files.folder)
        return InMemoryDataset(read_image_file(f"{folder}/{images}")[:, None], read_label_file(f"{folder}/{labels}"))
