"""The user's own pictures."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from fmlit.core.errors import FileError, UserError
from fmlit.core.files import expand
from fmlit.core.processes import ProcessGroup
from fmlit.core.progress import progress
from fmlit.core.workers import WatchedLoader
from fmlit.data.data_module import DataModule, Split
from fmlit.data.decoding import MAX_MEGAPIXELS, find_pictures, list_files, read_picture
from fmlit.data.stores import LabeledDataset

log = logging.getLogger(__name__)

SPLITS = {"train", "training", "val", "valid", "validation", "test"}
MOST_CLASSES = 5  # in the headline of a run
MOST_SKIPPED = 3  # names in the warning


class PictureFolder(LabeledDataset):
    """Pictures that are read when they are asked for.

    Args:
        root: folder of the pictures.
        names: paths relative to it.
        labels: class id of each picture.
        size: side of the square images.
        max_megapixels: larger pictures are refused.
    """

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        labels: Sequence[int],
        size: int,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> None:
        self.root, self.names, self.size, self.max_megapixels = root, list(names), size, max_megapixels
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = [self.read(index) for index in indices]
        return torch.stack(images), self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def read(self, index: int) -> Tensor:
        return read_picture(Path(self.root, self.names[index]), self.size, self.max_megapixels)

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
        check: With true, read all pictures before training, and stop if some are broken, naming all of them. With skip,
            leave them out, and say how many. Either takes as long as an epoch of reading.
        max_megapixels: Refuse pictures with more pixels than this, in millions.
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
        check: bool | Literal["skip"] = False,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> None:
        super().__init__(batch_size, seed)
        if size < 1:
            raise UserError(f"size must be at least 1 pixel, got {size}")
        if num_workers < 0:
            raise UserError(f"num_workers must be 0 (read in the training process) or more, got {num_workers}")
        self.root, self.test_root, self.classes = root, test_root, classes
        self.size, self.shape = size, (3, size, size)
        self.horizontal_flip, self.num_workers = horizontal_flip, num_workers
        self.check, self.max_megapixels = check, max_megapixels
        self._skipped: dict[Split, list[str]] = {}  # names of pictures that cannot be read
        folder = expand(root, "data.root")
        self._names, others = list_files(folder)
        self.class_names = _class_names(folder, self._names) if classes else None
        if others:
            counts = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(5))
            rank_zero_warn(f"{root}: left out files that fmlit does not read as pictures ({counts})")
        if self.class_names and {name.lower() for name in self.class_names} <= SPLITS:
            given = f"data.root {root}/train, with data.test_root for the held-out pictures"
            taken = ", ".join(self.class_names)
            rank_zero_warn(f"{root}: {taken} are taken for classes; if they are splits, use {given}")

    @property
    def title(self) -> str:
        if self.class_names is None:
            return f"{super().title} ({len(self._names):,} pictures)"
        counts = Counter(name.partition("/")[0] for name in self._names)
        shown = ", ".join(f"{name} {counts[name]:,}" for name in self.class_names[:MOST_CLASSES])
        more = ", ..." if len(self.class_names) > MOST_CLASSES else ""
        return f"{super().title} ({len(self._names):,} pictures of {len(self.class_names)} classes: {shown}{more})"

    def prepare_data(self) -> None:
        """Read all pictures, if asked to. Lightning calls this in one process per node."""
        if not self.check:
            return
        for split in ("train", "test") if self.test_root else ("train",):
            pictures = self.dataset(split)
            if self.check != "skip" and (problems := find_problems(pictures, self.num_workers)):
                for problem in problems.values():
                    log.warning("%s", problem)
                found = f"{len(problems):,} of {len(pictures):,} pictures in {pictures.root}"
                raise UserError(f"{found} cannot be read: see above; data.check: skip leaves them out")

    def setup(self, stage: str) -> None:
        """Leave out the pictures that the first process could not read. Lightning calls this in all processes."""
        skipped = ProcessGroup.current().from_first(lambda: self._skipped)
        if skipped != self._skipped:
            self._skipped = skipped
            self._datasets.clear()

    def dataset(self, split: Split) -> PictureFolder:
        return cast(PictureFolder, super().dataset(split))

    def load(self, split: Split) -> PictureFolder:
        root = self.root if split == "train" else self.test_root
        if root is None:
            raise UserError("ImageFolder has no test pictures: name their folder with test_root")
        folder = expand(root, f"data.{'root' if split == 'train' else 'test_root'}")
        names = self._names if split == "train" else find_pictures(folder)
        pictures = PictureFolder(folder, names, self._labels(folder, names), self.size, self.max_megapixels)
        return self._readable(split, pictures) if self.check == "skip" else pictures

    def _readable(self, split: Split, pictures: PictureFolder) -> PictureFolder:
        """The pictures that can be read. One process tries all of them once, and ``setup`` tells the others."""
        if split not in self._skipped:
            self._skipped[split] = list(find_problems(pictures, self.num_workers))
            if skipped := self._skipped[split]:
                shown = ", ".join(skipped[:MOST_SKIPPED]) + (", ..." if len(skipped) > MOST_SKIPPED else "")
                found = f"{len(skipped):,} of {len(pictures):,} pictures, which cannot be read"
                log.warning("%s: left out %s: %s", pictures.root, found, shown)
        broken = set(self._skipped[split])
        names = [name for name in pictures.names if name not in broken]
        labels = self._labels(Path(pictures.root), names)
        lost = sorted(set(pictures.labels.tolist()) - set(labels))
        if lost:
            of = f" of class {self.class_names[lost[0]]}" if self.class_names else ""
            raise UserError(f"{pictures.root}: none of the pictures{of} can be read")
        return PictureFolder(pictures.root, names, labels, pictures.size, pictures.max_megapixels)

    def _labels(self, root: Path, names: Sequence[str]) -> list[int]:
        if self.class_names is None:
            return [0] * len(names)
        ids = {name: label for label, name in enumerate(self.class_names)}
        folders = [name.partition("/")[0] for name in names]
        if unknown := sorted(set(folders) - ids.keys()):
            raise UserError(f"{Path(root, unknown[0])} belongs to none of the classes {', '.join(ids)} of {self.root}")
        return [ids[folder] for folder in folders]


def _class_names(root: Path, names: Sequence[str]) -> list[str] | None:
    """Folders directly below the root that hold pictures; None if the pictures lie in the root itself."""
    loose = [name for name in names if "/" not in name]
    if not loose:
        return sorted({name.partition("/")[0] for name in names})
    if len(loose) < len(names):
        raise UserError(f"{Path(root, loose[0])} lies beside class folders: move it into one, or pass classes: false")
    return None


class _Problems(Dataset[str]):
    """What is wrong with each picture of a folder; empty for nothing."""

    def __init__(self, pictures: PictureFolder) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> str:
        try:
            self.pictures.read(index)
        except (FileError, UserError) as error:
            return str(error)
        return ""


def find_problems(pictures: PictureFolder, num_workers: int = 0) -> dict[str, str]:
    """Read every picture. Returns what is wrong with those that cannot be read, by name."""
    loader = WatchedLoader(_Problems(pictures), batch_size=64, num_workers=num_workers, collate_fn=list)
    batches = progress(loader, len(loader), "checking pictures")
    problems = [problem for batch in batches for problem in batch]
    return {name: problem for name, problem in zip(pictures.names, problems, strict=True) if problem}
