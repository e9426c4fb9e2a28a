"""Files of published data sets: complete and intact, or a one-line error that says which is not and what to do."""

import hashlib
import os
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any

from fmlit.core.errors import UserError
from fmlit.core.files import expand
from fmlit.data.data_module import DataModule


@dataclass(frozen=True)
class OfficialFiles:
    """The files that make up a published data set.

    Args:
        name: name of the data set, for messages.
        root: folder that holds the data set's own folder.
        subfolder: the data set's own folder, as torchvision names it.
        checksums: hexadecimal digest of each file, by file name.
        algorithm: the hash function of the checksums, by its name in hashlib.
    """

    name: str
    root: Path
    subfolder: str
    checksums: Mapping[str, str]
    algorithm: str

    @property
    def folder(self) -> Path:
        return self.root / self.subfolder

    def missing(self, names: Collection[str] | None = None) -> list[str]:
        """Those of ``names`` (by default all) that are not there."""
        return [name for name in names or self.checksums if not (self.folder / name).is_file()]

    def check_folder(self) -> None:
        """Raise a FileNotFoundError unless the data set's folder exists."""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.name}: there is no folder {self.folder}; {self._way_out()}")

    def check(self, names: Collection[str] | None = None) -> None:
        """Raise a FileNotFoundError or UserError unless ``names`` (by default all) are there and intact."""
        self.check_folder()
        if missing := self.missing(names):
            raise FileNotFoundError(f"{self.name}: {self.folder / missing[0]} is missing; {self._way_out()}")
        for name in names or self.checksums:
            with open(self.folder / name, "rb") as file:
                digest = hashlib.file_digest(file, self.algorithm).hexdigest()
            if digest != self.checksums[name]:
                raise UserError(
                    f"{self.name}: {self.folder / name} is truncated or damaged ({self.algorithm} {digest[:12]}..., "
                    f"official {self.checksums[name][:12]}...); delete it and run again with download: true"
                )

    def download_missing(self, fetch: Callable[[Path], object]) -> None:
        """Put the files that are missing into the folder, each one whole and verified, or not at all.

        ``fetch(root)`` downloads and unpacks the data set below another root. That is a temporary folder beside the
        real one: an interrupted download leaves no half file under a real name, and the nodes of a cluster may
        download into a shared folder at the same time.
        """
        if not self.missing():
            return  # before any write: the folder may be read-only
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            staging = tempfile.TemporaryDirectory(dir=self.root, prefix=f".{self.name}-download-")
        except OSError as error:
            raise UserError(
                f"{self.name}: cannot write to {self.folder} ({error.strerror}); choose another root, or let someone "
                "who may write there put the official files in"
            ) from error
        with staging:
            staged = replace(self, root=Path(staging.name))
            try:
                fetch(staged.root)
            except (OSError, RuntimeError, HTTPException, EOFError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise FileNotFoundError(
                    f"{self.name}: {self.folder / self.missing()[0]} is missing and the download failed ({reason}); "
                    "try again, or put the official files there"
                ) from error
            staged.check()
            for name in self.missing():
                os.replace(staged.folder / name, self.folder / name)

    def _way_out(self) -> str:
        return f"put the official files into {self.folder}, or train once with download: true"


class PublishedData(DataModule):
    """A published data set that torchvision downloads. A subclass states its ``files``.

    Args:
        root: Folder that holds the data set's own folder. It may be read-only when the files are there.
        batch_size: Images per optimizer step, over all ranks and all accumulated batches.
        seed: Seed of the order in which training sees the images.
        download: Fetch the files when they are missing.
    """

    torchvision_name: str

    def __init__(self, root: str = "data", batch_size: int = 128, seed: int = 0, download: bool = True) -> None:
        super().__init__(batch_size, seed)
        self.root, self.download = root, download
        if not download:
            self.files.check_folder()

    @property
    def folder(self) -> Path:
        """``root``, expanded."""
        return expand(self.root, "data.root")

    @cached_property
    @abstractmethod
    def files(self) -> OfficialFiles:
        """The official files below ``root``."""

    @property
    def published(self) -> Any:
        """torchvision's class of the data set."""
        import torchvision.datasets

        return getattr(torchvision.datasets, self.torchvision_name)

    def prepare_data(self) -> None:
        """Download what is missing. Lightning calls this in one process per node."""
        if self.download:
            self.files.download_missing(lambda root: self.published(root, download=True))
