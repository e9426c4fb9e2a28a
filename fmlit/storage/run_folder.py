"""Run folders: how a launch gets one, how it comes back to it, and how all its processes agree on it.

A run lives in ``runs/<name>/``; an occupied name becomes ``name-002``, ``name-003``, ... A file ``run.json`` in the
folder keeps the name, the launches that worked there, and the W&B id.
"""

import contextlib
import itertools
import json
import re
import uuid
from pathlib import Path
from typing import Any

from fmlit.core.errors import FileError, UserError
from fmlit.core.files import atomic_write


def claim(root: str | Path, name: str) -> Path:
    """Create the folder of a new run: ``root/name``, or with the next number. Two jobs never get the same one.

    Raises:
        UserError: the name is not a plain folder name.
        FileError: ``root`` cannot be written.
    """
    root = Path(root)
    if not name.strip() or name in (".", "..") or re.search(r"[/\\\x00-\x1f]", name):
        raise UserError(f"a run's name is a plain folder name, without slashes, got {name!r}")
    runs = runs_named(root, name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(_number(runs[-1], name) + 1 if runs else 1):
            folder = root / (name if number == 1 else f"{name}-{number:03d}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()  # the one atomic step that decides between two jobs
                break
        try:
            write_record(folder, {"name": name})
        except OSError:
            folder.rmdir()
            raise
    except OSError as error:
        raise FileError(f"cannot create a run folder in {root}: {error.strerror or error}; choose another") from error
    return folder


def newest(root: str | Path, name: str) -> Path:
    """The folder of the run of that name that was claimed last. Raises UserError if there is none."""
    runs = runs_named(Path(root), name)
    if not runs:
        raise UserError(f"there is no run named {name!r} in {root} to go on with; start it without --resume")
    return runs[-1]


def wandb_id(folder: str | Path) -> str:
    """The W&B id of a run: made once, kept in the run folder, and the same after every resume. For rank 0."""
    known = read_record(Path(folder))
    if "wandb_id" not in known:
        known["wandb_id"] = uuid.uuid4().hex[:12]
        write_record(Path(folder), known)
    return known["wandb_id"]


def runs_named(root: Path, name: str) -> list[Path]:
    """All folders of that name, oldest first. ``name-256`` may also be a name of its own, so ``run.json`` decides."""
    folders = [root / name] if (root / name).is_dir() else []
    numbered = [folder for folder in root.iterdir() if _number(folder, name) > 1] if root.is_dir() else []
    folders += [folder for folder in numbered if read_record(folder).get("name") == name]
    return sorted(folders, key=lambda folder: _number(folder, name))


def _number(folder: Path, name: str) -> int:
    """1 for ``name``, 2 for ``name-002``, and so on; 0 for any other folder."""
    found = re.fullmatch(rf"{re.escape(name)}(?:-(\d{{3,}}))?", folder.name)
    return int(found[1] or 1) if found else 0


def read_record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, or the whole run") from error


def write_record(folder: Path, known: dict[str, Any]) -> None:
    with atomic_write(folder / "run.json") as file:
        file.write(json.dumps(known, indent=1).encode())


def find_checkpoint(path: str | Path, option: str | None = None) -> Path:
    """A checkpoint file as it is; of a run folder, its newest checkpoint ``checkpoints/last.ckpt``.

    Raises:
        UserError: there is none. The message names the ``option`` of the command line that was given the path.
    """
    found = Path(path) / "checkpoints" / "last.ckpt" if Path(path).is_dir() else Path(path)
    if not found.is_file():
        give = f"give --{option}" if option else "give"
        raise UserError(f"there is no checkpoint {found}: {give} a .ckpt file, the folder of a run, or an exported one")
    return found


def folder_of_run(checkpoint: Path) -> Path:
    """The run folder of a checkpoint file, or the folder in which it lies; an exported folder is its own."""
    if checkpoint.is_dir():
        return checkpoint
    return checkpoint.parent.parent if checkpoint.absolute().parent.name == "checkpoints" else checkpoint.parent
