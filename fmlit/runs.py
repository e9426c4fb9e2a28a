"""Run folders: how a launch gets one, how it comes back to it, and how all its processes agree on it.

A run lives in ``runs/<name>/``; an occupied name becomes ``name-002``, ``name-003``, ... A file ``run.json`` in the
folder keeps the name, the launches that worked there, and the W&B id.
"""

import contextlib
import itertools
import json
import os
import re
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch.distributed import TCPStore

_calls = itertools.count()
_hosted: list[TCPStore] = []  # rank 0's stores: the process group goes on with the server, so it must stay alive


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
    from fmlit.checkpoints import replacing  # imports Lightning, for which all but rank 0 need not wait here

    with replacing(folder / "run.json") as file:
        file.write(json.dumps(known, indent=1).encode())


def _launch() -> tuple[str | None, bool]:
    """What stays the same when a job is requeued or restarted, if anything does, and whether it has been."""
    counts = [os.environ.get(name) or "0" for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")]
    restarted = any(int(count) > 0 for count in counts)
    if job := os.environ.get("SLURM_JOB_ID"):  # of an array, each task has its own; a job may run several steps
        return f"slurm {job}.{os.environ.get('SLURM_STEP_ID', 'batch')}", restarted
    meeting = _find_meeting(alone=True)
    if meeting is not None and meeting.served:
        # Not by its count of restarts, which stays the same where nodes come or go.
        name = f"fmlit/launch {uuid.uuid4().hex}"
        launch = _connect(meeting, timeout_s=60).compare_set("fmlit/launch", "", name).decode()
        return launch, launch != name
    if run := os.environ.get("TORCHELASTIC_RUN_ID"):
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return f"torchrun {address if run == 'none' else run}", restarted  # "none" is what every launch gets
    return None, False


def agree(decide: Callable[[], str], timeout_s: float = 300.0) -> str:
    """What ``decide`` returns on rank 0, on every process; there is no process group yet, so it comes by other ways.

    Processes of torchrun and srun meet in a store at MASTER_ADDR:MASTER_PORT. Lightning's own launcher starts its
    children from rank 0 after this call: they inherit an environment variable. All call this in the same order.

    Raises:
        ValueError: ``decide`` failed on rank 0 (which raises the error itself), or this process has no rank 0.
        OSError: the processes do not find each other within ``timeout_s`` seconds.
    """
    call = next(_calls)
    meeting = _find_meeting()
    if meeting is not None:
        store, key = _connect(meeting, timeout_s), f"fmlit/{call}"
        if meeting.rank:
            return _listen(store, key, meeting.rank, timeout_s)
        return _announce(store, key, decide, meeting.world_size, timeout_s)
    variable = f"FMLIT_AGREED_{call}"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[variable] = decide()
    elif variable not in os.environ:
        raise ValueError(
            f"LOCAL_RANK is {os.environ['LOCAL_RANK']}, but no process has decided for this one: start the script "
            f"once and let it launch the others, or use torchrun or srun"
        )
    return os.environ[variable]


class _Meeting(NamedTuple):
    rank: int
    world_size: int
    address: str
    port: int
    served: bool  # by torchrun's agent, which runs a store of its own


def _find_meeting(alone: bool = False) -> _Meeting | None:
    """Where the processes of this launch meet; None for Lightning's launcher, and unless ``alone`` for a single one."""
    env = os.environ
    meeting = None
    if env.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:
        served = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        meeting = _Meeting(
            int(env["RANK"]), int(env["WORLD_SIZE"]), env["MASTER_ADDR"], int(env["MASTER_PORT"]), served
        )
    elif "SLURM_NTASKS" in env:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        if SLURMEnvironment.detect():  # false in an interactive shell on a node
            try:
                slurm = SLURMEnvironment(auto_requeue=False)
            except RuntimeError as error:
                raise ValueError(str(error)) from error
            meeting = _Meeting(slurm.global_rank(), slurm.world_size(), slurm.main_address, slurm.main_port, False)
    if meeting is None and int(env.get("NODE_RANK", 0)) > 0 and "LOCAL_RANK" not in env:
        raise ValueError(f"NODE_RANK is {env['NODE_RANK']}: to train on several nodes, launch with torchrun or srun")
    return meeting if meeting is not None and (alone or meeting.world_size > 1) else None


def _connect(meeting: _Meeting, timeout_s: float) -> TCPStore:
    rank, _, address, port, served = meeting
    hosting = rank == 0 and not served
    timeout = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(
            address, port, is_master=hosting, timeout=timeout, wait_for_workers=False, multi_tenant=hosting
        )
    except RuntimeError as error:
        problem = "cannot listen" if hosting else f"did not find rank 0 within {timeout_s:g} s"
        raise OSError(
            f"rank {rank} {problem} at {address}:{port} ({_first_line(error)}); look at what rank 0 says, or set "
            f"MASTER_PORT to a free port"
        ) from error
    if hosting:
        _hosted.append(store)
    return store


def _listen(store: TCPStore, key: str, rank: int, timeout_s: float) -> str:
    mine, until = uuid.uuid4().hex, time.monotonic() + timeout_s
    try:
        while True:
            said = f"{key}/{store.get(f'{key}/leader').decode()}"
            store.set(f"{said}/{rank}", mine)
            try:
                store.wait([f"{said}/{mine}"], timedelta(seconds=min(1.0, timeout_s)))
            except RuntimeError:
                if time.monotonic() > until:
                    raise
                continue  # that was the rank 0 of an earlier round, or it is slow
            answer = json.loads(store.get(said))
            store.set(f"{said}/{mine}/heard", "")
            break
    except RuntimeError as error:
        raise TimeoutError(
            f"rank {rank} heard nothing from rank 0 ({_first_line(error)}); look at what that says"
        ) from error
    if "error" in answer:
        raise ValueError(f"rank 0: {answer['error']}")
    return answer["value"]


def _announce(store: TCPStore, key: str, decide: Callable[[], str], world_size: int, timeout_s: float) -> str:
    """Say it to every rank of this round, and to none of an earlier one.

    torchrun's store outlives restarts and changes of membership, and so does what was said in it. So both sides have
    names of this round, and an answer counts where it was confirmed under both.
    """
    failure: Exception | None = None
    try:
        answer = {"value": decide()}
    except Exception as error:
        failure, answer = error, {"error": _first_line(error)}
    leader = uuid.uuid4().hex
    said = f"{key}/{leader}"
    store.set(said, json.dumps(answer))
    store.set(f"{key}/leader", leader)
    missing = set(range(1, world_size))
    until = time.monotonic() + timeout_s
    while missing and time.monotonic() < until:
        time.sleep(0.01)
        for rank in [rank for rank in missing if store.check([f"{said}/{rank}"])]:
            name = store.get(f"{said}/{rank}").decode()
            store.set(f"{said}/{name}", "")
            if store.check([f"{said}/{name}/heard"]):  # the store ends with this process, so all must have heard before
                missing.remove(rank)
    if failure is not None:
        raise failure
    if missing:
        raise TimeoutError(
            f"ranks {sorted(missing)} of {world_size} did not come; was the script started by torchrun or srun?"
        )
    return answer["value"]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
