"""The user's own pictures."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.data.data_module import DataModule, Split
from fmlit.data.decoding import find_pictures, read_picture
from fmlit.data.stores import LabeledDataset


class PictureFolder(LabeledDataset):
    """Pictures that are read when they are asked for.

    Args:
        root: folder of the pictures.
        names: paths relative to it.
        labels: class id of each picture.
        size: side of the square images.
    """

    def __init__(self, root: str, names: Sequence[str], labels: Sequence[int], size: int) -> None:
        self.root, self.names, self.size = root, list(names), size
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = [read_picture(Path(self.root, self.names[index]), self.size) for index in indices]
        return torch.stack(images), self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def fingerprint(self) -> str:
        """Hash of the size, the labels, and each file's name, length and time of change.

        Not of the contents: reading a large folder takes minutes. A copy that does not keep the times counts as new.
        """
        digest = hashlib.blake2b(f"lanczos {self.size}".encode(), digest_size=8)
        for name, label in zip(self.names, self.labels.tolist(), strict=True):
            status = os.stat(Path(self.root, name))
            digest.update(os.fsencode(name) + f"\0{label} {status.st_size} {status.st_mtime_ns}\0".encode())
        return digest.hexdigest()


class ImageFolder(DataModule):
    """Your own pictures: a folder of PNG, JPEG, WebP, BMP, GIF, TIFF or PPM files, at any depth, of any size.

    The shorter side is resized to ``size`` and the central square is taken. Folders directly below ``root`` are the
    classes, if there are any. Files and folders whose names start with a dot are left out.

    Args:
        root: Folder of the pictures to train on.
        size: Side of the square images, in pixels.
        batch_size: Images per optimizer step, over all ranks and all accumulated batches.
        seed: Seed of the order in which training sees the images, and of their flips.
        horizontal_flip: Mirror training images left to right with probability 1/2.
        classes: Take folders as classes. With false, all pictures are of one kind.
        test_root: Folder of held-out pictures, with the same classes.
        num_workers: Processes that read pictures, for each rank.
    """

    def __init__(
        self,
        root: str,
        size: int,
        batch_size: int = 128,
        seed: int = 0,
        horizontal_flip: bool = False,
        classes: bool = True,
        test_root: str | None = None,
        num_workers: int = 4,
    ) -> None:
        super().__init__(batch_size, seed)
        if size < 1:
            raise UserError(f"size must be at least 1 pixel, got {size}")
        if num_workers < 0:
            raise UserError(f"num_workers must be 0 (read in the training process) or more, got {num_workers}")
        self.root, self.test_root, self.classes = root, test_root, classes
        self.size, self.shape = size, (3, size, size)
        self.horizontal_flip, self.num_workers = horizontal_flip, num_workers
        self._names = find_pictures(root)
        self.class_names = _class_names(root, self._names) if classes else None

    def load(self, split: Split) -> PictureFolder:
        root = self.root if split == "train" else self.test_root
        if root is None:
            raise UserError("ImageFolder has no test pictures: name their folder with test_root")
        names = self._names if split == "train" else find_pictures(root)
        return PictureFolder(root, names, self._labels(root, names), self.size)

    def _labels(self, root: str, names: Sequence[str]) -> list[int]:
        if self.class_names is None:
            return [0] * len(names)
        ids = {name: label for label, name in enumerate(self.class_names)}
        folders = [name.partition("/")[0] for name in names]
        if unknown := sorted(set(folders) - ids.keys()):
            raise UserError(f"{Path(root, unknown[0])} is of none of the classes {', '.join(ids)} of {self.root}")
        return [ids[folder] for folder in folders]


def _class_names(root: str, names: Sequence[str]) -> list[str] | None:
    """Folders directly below the root that hold pictures; None if the pictures lie in the root itself."""
    loose = [name for name in names if "/" not in name]
    if not loose:
        return sorted({name.partition("/")[0] for name in names})
    if len(loose) < len(names):
        raise UserError(f"{Path(root, loose[0])} lies beside class folders: move it into one, or pass classes: false")
    return None
