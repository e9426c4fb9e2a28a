"""How a launch gets its run folder, how it comes back to it, and how all its processes agree on it."""

import json
import os
import uuid
from pathlib import Path
from typing import Literal, NamedTuple

from fmlit.storage.run_folder import claim, newest, read_record, runs_named, write_record
from fmlit.training.rendezvous import agree, connect, find_meeting


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
        for folder in reversed(runs_named(root, name)):
            if launch in read_record(folder).get("launches", []):
                return Run(folder, True)
    if resume == "auto":
        resume = bool(runs_named(root, name))
    folder = newest(root, name) if resume else claim(root, name)
    if launch:
        known = read_record(folder)
        write_record(folder, known | {"launches": [*known.get("launches", []), launch]})
    return Run(folder, resume)


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
