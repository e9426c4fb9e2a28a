"""Run folders: how a launch gets one, how it comes back to it, and how all its processes agree on it.

A run lives in ``runs/<name>/``; an occupied name becomes ``name-002``, ``name-003``, ... A file ``run.json`` in the
folder keeps the name, the launches that worked there, and the W&B id.
"""

import contextlib
import itertools
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fmlit.agreement import agree, connect, find_meeting
from fmlit.files import replacing


class Run(NamedTuple):
    """A run folder, and whether this launch goes on with what is in there."""

    folder: Path
    resumed: bool


def begin(root: str | Path, name: str, resume: bool | Literal["auto"] = False) -> Run:
    """The run folder of this launch, decided by rank 0 for all processes; all of them call it, first thing.

    A requeued Slurm job and a torchrun restart come back to the folder that they had, as a resumed run. Otherwise
    ``resume`` goes on with the newest run of that name ("auto": if there is one), and without it a new folder is
    claimed.
    """

    def decide() -> str:
        folder, resumed = _choose(Path(root), name, resume)
        return json.dumps([str(folder), resumed])

    folder, resumed = json.loads(agree(decide))
    return Run(Path(folder), resumed)


def _choose(root: Path, name: str, resume: bool | Literal["auto"]) -> Run:
    launch, restarted = _launch()
    if restarted:
        for folder in reversed(_runs(root, name)):
            if launch in _read(folder).get("launches", []):
                return Run(folder, True)
    if resume == "auto":
        resume = bool(_runs(root, name))
    folder = newest(root, name) if resume else claim(root, name)
    if launch:
        known = _read(folder)
        _write(folder, known | {"launches": [*known.get("launches", []), launch]})
    return Run(folder, resume)


def claim(root: str | Path, name: str) -> Path:
    """Create the folder of a new run: ``root/name``, or with the next number. Two jobs never get the same one.

    Raises:
        ValueError: the name is not a plain folder name.
        OSError: ``root`` cannot be written.
    """
    root = Path(root)
    if not name.strip() or name in (".", "..") or re.search(r"[/\\\x00-\x1f]", name):
        raise ValueError(f"a run's name is a plain folder name, without slashes, got {name!r}")
    runs = _runs(root, name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(_number(runs[-1], name) + 1 if runs else 1):
            folder = root / (name if number == 1 else f"{name}-{number:03d}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()  # the one atomic step that decides between two jobs
                break
        try:
            _write(folder, {"name": name})
        except OSError:
            folder.rmdir()
            raise
    except OSError as error:
        raise OSError(f"cannot create a run folder in {root}: {error.strerror or error}; choose another") from error
    return folder


def newest(root: str | Path, name: str) -> Path:
    """The folder of the run of that name that was claimed last. Raises ValueError if there is none."""
    runs = _runs(Path(root), name)
    if not runs:
        raise ValueError(f"there is no run named {name!r} in {root} to go on with; start it without --resume")
    return runs[-1]


def wandb_id(folder: str | Path) -> str:
    """The W&B id of a run: made once, kept in the run folder, and the same after every resume. For rank 0."""
    known = _read(Path(folder))
    if "wandb_id" not in known:
        known["wandb_id"] = uuid.uuid4().hex[:12]
        _write(Path(folder), known)
    return known["wandb_id"]


def _runs(root: Path, name: str) -> list[Path]:
    """All folders of that name, oldest first. ``name-256`` may also be a name of its own, so ``run.json`` decides."""
    folders = [root / name] if (root / name).is_dir() else []
    numbered = [folder for folder in root.iterdir() if _number(folder, name) > 1] if root.is_dir() else []
    folders += [folder for folder in numbered if _read(folder).get("name") == name]
    return sorted(folders, key=lambda folder: _number(folder, name))


def _number(folder: Path, name: str) -> int:
    """1 for ``name``, 2 for ``name-002``, and so on; 0 for any other folder."""
    found = re.fullmatch(rf"{re.escape(name)}(?:-(\d{{3,}}))?", folder.name)
    return int(found[1] or 1) if found else 0


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, or the whole run") from error


def _write(folder: Path, known: dict[str, Any]) -> None:
    with replacing(folder / "run.json") as file:
        file.write(json.dumps(known, indent=1).encode())


def _launch() -> tuple[str | None, bool]:
    """What stays the same when a job is requeued or restarted, if anything does, and whether it has been."""
    counts = [os.environ.get(name) or "0" for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")]
    restarted = any(int(count) > 0 for count in counts)
    if job := os.environ.get("SLURM_JOB_ID"):  # of an array, each task has its own; a job may run several steps
        return f"slurm {job}.{os.environ.get('SLURM_STEP_ID', 'batch')}", restarted
    meeting = find_meeting(alone=True)
    if meeting is not None and meeting.served:
        # Not by its count of restarts, which stays the same where nodes come or go.
        name = f"fmlit/launch {uuid.uuid4().hex}"
        launch = connect(meeting, timeout_s=60).compare_set("fmlit/launch", "", name).decode()
        return launch, launch != name
    if run := os.environ.get("TORCHELASTIC_RUN_ID"):
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return f"torchrun {address if run == 'none' else run}", restarted  # "none" is what every launch gets
    return None, False
