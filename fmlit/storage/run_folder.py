"""The folder of a run: every path in it, the record that identifies it, and how a launch claims one.

A run lives in ``runs/<name>/``. If that folder exists, a new run gets ``<name>-002``, ``<name>-003`` and so on.
"""

import contextlib
import itertools
import json
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmlit.core.errors import UserError, writing_error
from fmlit.core.files import atomic_write, file_errors

LAST = "last.ckpt"


@dataclass(frozen=True)
class RunFolder(os.PathLike[str]):
    """A run folder. All code that reads or writes a part of a run asks here where that part is.

    ``run.json`` is its record: the run's ``name``, the ``launches`` that worked in the folder, and its ``wandb_id``.
    """

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        """The configuration that repeats the run."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One row of numbers for each logged step."""
        return self.path / "metrics.csv"

    @property
    def samples(self) -> Path:
        """The folder of the pictures that are drawn during training."""
        return self.path / "samples"

    def next_drawing(self) -> Path:
        """A new file for a picture that ``sample`` draws: samples/drawn-001.png, drawn-002.png, and so on."""
        stems = [file.stem.rpartition("-")[2] for file in self.samples.glob("drawn-*.png")]
        return self.samples / f"drawn-{max([int(stem) for stem in stems if stem.isdecimal()], default=0) + 1:03d}.png"

    @property
    def evaluation(self) -> Path:
        """The folder of the scores that ``evaluate`` computes."""
        return self.path / "evaluation"

    @property
    def export(self) -> Path:
        """The folder that ``export`` writes."""
        return self.path / "export"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """A link to the newest checkpoint."""
        return self.checkpoints / LAST

    @property
    def best(self) -> Path:
        """The checkpoint with the best score."""
        return self.checkpoints / "best.ckpt"

    def checkpoint(self, images_seen: int) -> Path:
        return self.checkpoints / f"{images_seen:09d}.ckpt"

    def milestone(self, images_seen: int) -> Path:
        """A checkpoint that is never removed."""
        return self.checkpoints / f"milestone-{images_seen:09d}.ckpt"

    def sample_grid(self, images_seen: int) -> Path:
        return self.samples / f"{images_seen:09d}.png"

    def saved_images(self) -> list[int]:
        """The images seen by each regular checkpoint in the folder, in increasing order."""
        # Sorted as numbers, because the names grow longer at 10^9 images.
        return sorted(int(file.stem) for file in self.checkpoints.glob("*.ckpt") if file.stem.isdigit())

    def has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("*.ckpt"))

    @property
    def record_file(self) -> Path:
        return self.path / "run.json"

    def read_record(self) -> dict[str, Any]:
        """The record, empty if there is none. Raises UserError if the file is damaged."""
        if not self.record_file.exists():
            return {}
        try:
            return dict(json.loads(self.record_file.read_text()))
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.record_file} is damaged ({error}); delete it, or the whole run") from error

    def write_record(self, record: dict[str, Any]) -> None:
        with file_errors(self.record_file), atomic_write(self.record_file) as file:
            file.write(json.dumps(record, indent=1).encode())

    def add_launch(self, launch: str) -> None:
        """Note in the record that this launch works in the folder."""
        record = self.read_record()
        self.write_record(record | {"launches": [*record.get("launches", []), launch]})

    def wandb_id(self, new: str | None = None) -> str:
        """The id of the W&B run: ``new`` or generated, kept in the record, the same after every resume. For rank 0."""
        record = self.read_record()
        if "wandb_id" not in record:
            record["wandb_id"] = new or uuid.uuid4().hex[:12]
            self.write_record(record)
        return record["wandb_id"]

    @staticmethod
    def of_checkpoint(file: Path) -> "RunFolder":
        """The run folder of a checkpoint, or the folder of a file that is in no run. An export is its own folder."""
        if file.is_dir():
            return RunFolder(file)
        in_run = file.absolute().parent.name == "checkpoints"
        # Not file.parent.parent, which ends at the working directory.
        return RunFolder(Path(os.path.normpath(file.parent / "..")) if in_run else file.parent)

    @staticmethod
    def claim(root: str | Path, name: str) -> "RunFolder":
        """Create the folder of a new run: ``root/name``, or with the next number. Two jobs never get the same one.

        Raises:
            UserError: the name is not a plain folder name.
            FileError: ``root`` cannot be written.
        """
        root = Path(root)
        if not name.strip() or name in (".", "..") or re.search(r"^~|[/\\\x00-\x1f]", name):
            raise UserError(f"a run's name is a plain folder name, without slashes, got {name!r}")
        runs = RunFolder.named(root, name)
        try:
            root.mkdir(parents=True, exist_ok=True)
            for number in itertools.count(_number(runs[-1].path, name) + 1 if runs else 1):
                folder = RunFolder(root / (name if number == 1 else f"{name}-{number:03d}"))
                with contextlib.suppress(FileExistsError):
                    folder.path.mkdir()  # the one atomic step that decides between two jobs
                    break
            try:
                folder.write_record({"name": name})
            except OSError:
                folder.path.rmdir()
                raise
        except OSError as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # write_record has wrapped it
            reason = cause.strerror or cause
            raise writing_error(f"cannot create a run folder in {root}: {reason}; choose another", cause) from error
        return folder

    @staticmethod
    def newest(root: str | Path, name: str) -> "RunFolder":
        """The folder of that name that was claimed last. Raises UserError if there is none."""
        runs = RunFolder.named(root, name)
        if not runs:
            raise UserError(f"there is no run named {name!r} in {root} to continue; start it without --resume")
        return runs[-1]

    @staticmethod
    def named(root: str | Path, name: str) -> list["RunFolder"]:
        """All runs of that name, oldest first. ``name-256`` may also be a name of its own, so the record decides."""
        root = Path(root)
        folders = [RunFolder(root / name)] if (root / name).is_dir() else []
        numbered = [path for path in root.iterdir() if _number(path, name) > 1] if root.is_dir() else []
        folders += [folder for folder in map(RunFolder, numbered) if folder.read_record().get("name") == name]
        return sorted(folders, key=lambda folder: _number(folder.path, name))


def _number(path: Path, name: str) -> int:
    """1 for ``name``, 2 for ``name-002``, and so on; 0 for any other folder."""
    match = re.fullmatch(rf"{re.escape(name)}(?:-(\d{{3,}}))?", path.name)
    return int(match[1] or 1) if match else 0
