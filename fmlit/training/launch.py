"""How a launch gets its run folder, how it comes back to it, and how all its processes agree on it."""

import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fmlit.storage.lease import Terms, abandon, hold
from fmlit.storage.run_folder import RunFolder
from fmlit.training.rendezvous import agree, connect, find_meeting


def begin(
    root: str | Path,
    name: str,
    resume: bool | Literal["auto"] = False,
    own: RunFolder | None = None,
    terms: Terms = Terms(),
) -> tuple[RunFolder, bool]:
    """Choose the run folder of this launch. Rank 0 decides for all processes, and each calls this before all else.

    A requeued Slurm job and a torchrun restart come back to their folder as a resumed run. Otherwise ``resume``
    continues the newest run of that name ("auto": if there is one), and without it a new folder is claimed.

    Args:
        root: the folder of all runs.
        name: the name of the run.
        resume: whether to continue a run.
        own: the run that is meant if one is continued, whatever other runs have its name.
        terms: how its lease is taken.

    Returns:
        The folder, and whether this launch continues what is in it. Rank 0 holds its lease.

    Raises:
        TryAgainError: another launch works in the folder.
    """
    patience, claimed = 300.0 + terms.expiry_s + terms.wait_s, list[RunFolder]()
    try:
        folder, resumed = agree(lambda: _choose(root, name, resume, own, terms, claimed), patience)
    except BaseException:  # a signal, too, or a process that did not come
        for unused in claimed:
            abandon(unused)
        raise
    return RunFolder(Path(folder)), resumed


def _choose(
    root: str | Path,
    name: str,
    resume: bool | Literal["auto"],
    own: RunFolder | None,
    terms: Terms,
    claimed: list[RunFolder],
) -> tuple[str, bool]:
    """The run folder, and whether it is continued. A new one is added to ``claimed`` before anything else can fail."""
    launch, restarted = _identify_launch()
    runs = [own] if own and resume else RunFolder.named(root, name)
    if restarted:
        for folder in reversed(runs):
            if launch in folder.read_record().get("launches", []):
                hold(folder, replace(terms, launch=launch, restarted=True))
                return str(folder), True
    resume = bool(runs) if resume == "auto" else resume
    folder = (own or RunFolder.newest(root, name)) if resume else RunFolder.claim(root, name)
    if not resume:
        claimed.append(folder)
    hold(folder, replace(terms, launch=launch))
    if launch:
        folder.add_launch(launch)
    return str(folder), resume


def _identify_launch() -> tuple[str | None, bool]:
    """What stays the same when a job is requeued or restarted, if anything does, and whether it has been."""
    counts = [os.environ.get(name) or "0" for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")]
    restarted = any(int(count) > 0 for count in counts)
    if job := os.environ.get("SLURM_JOB_ID"):  # each task of an array has its own id; a job may run several steps
        return f"slurm {job}.{os.environ.get('SLURM_STEP_ID', 'batch')}", restarted
    meeting = find_meeting(alone=True)
    if meeting is not None and meeting.served:
        # The store knows, and not the count of restarts, which stays the same where nodes join or leave.
        name = f"fmlit/launch {uuid.uuid4().hex}"
        launch = connect(meeting, timeout_s=60).compare_set("fmlit/launch", "", name).decode()
        return launch, launch != name
    if run := os.environ.get("TORCHELASTIC_RUN_ID"):
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return f"torchrun {address if run == 'none' else run}", restarted  # every launch without an id gets "none"
    return None, False
