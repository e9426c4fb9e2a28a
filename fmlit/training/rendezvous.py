"""How the processes of a launch agree, before there is a process group: rank 0 decides, and all hear it."""

import itertools
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

from lightning.fabric.plugins.environments import SLURMEnvironment
from torch.distributed import TCPStore

from fmlit.core.errors import TryAgainError, UserError, first_line, from_rank, kind_of

_calls = itertools.count()
_hosted: list[TCPStore] = []  # rank 0's stores: the process group goes on with the server, so it must stay alive


def agree(decide: Callable[[], Any], timeout_s: float = 300.0) -> Any:
    """Return what ``decide`` returns on rank 0, on every process. It must be plain data, as JSON holds it.

    There need not be a process group yet.

    Processes of torchrun and srun meet in a store at MASTER_ADDR:MASTER_PORT. Lightning's own launcher starts its
    children from rank 0 after this call: they inherit an environment variable. All call this in the same order.

    Raises:
        UserError: ``decide`` raised one on rank 0, rank 0 cannot listen, or this process has no rank 0.
        TryAgainError: the processes do not find each other within ``timeout_s`` seconds.
        RuntimeError: ``decide`` raised another error on rank 0, which raises it itself.
    """
    call = next(_calls)
    meeting = find_meeting()
    if meeting is not None:
        store, key = connect(meeting, timeout_s), f"fmlit/{call}"
        if meeting.rank:
            return _listen(store, key, meeting.rank, timeout_s)
        return _announce(store, key, decide, meeting.world_size, timeout_s)
    variable = f"FMLIT_AGREED_{call}"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[variable] = json.dumps(decide())
    elif variable not in os.environ:
        started = f"LOCAL_RANK is {os.environ['LOCAL_RANK']}, but no process has decided for this one"
        raise UserError(f"{started}: start the script once and let it launch the others, or use torchrun or srun")
    return json.loads(os.environ[variable])


class Meeting(NamedTuple):
    rank: int
    world_size: int
    address: str
    port: int
    served: bool  # by torchrun's agent, which runs a store of its own


def find_meeting(alone: bool = False) -> Meeting | None:
    """Where the processes of this launch meet; None for Lightning's launcher, and unless ``alone`` for a single one."""
    env = os.environ
    meeting = None
    if env.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:
        served = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        meeting = Meeting(int(env["RANK"]), int(env["WORLD_SIZE"]), env["MASTER_ADDR"], int(env["MASTER_PORT"]), served)
    elif "SLURM_NTASKS" in env and SLURMEnvironment.detect():  # false in an interactive shell on a node
        try:
            slurm = SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:
            raise UserError(str(error)) from error
        meeting = Meeting(slurm.global_rank(), slurm.world_size(), slurm.main_address, slurm.main_port, False)
    else:
        _check_interactive_step()
    if meeting is None and int(env.get("NODE_RANK", 0)) > 0 and "LOCAL_RANK" not in env:
        raise UserError(f"NODE_RANK is {env['NODE_RANK']}: to train on several nodes, launch with torchrun or srun")
    return meeting if meeting is not None and (alone or meeting.world_size > 1) else None


def _check_interactive_step() -> None:
    """Raise a UserError if srun started several processes in a Slurm job whose name makes Lightning ignore Slurm.

    Each would train alone. A shell that ``srun --pty`` opened looks the same in its first task, but has a terminal.
    """
    env = os.environ
    several = int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1
    if several and (int(env.get("SLURM_PROCID") or 0) > 0 or not (sys.stdin and sys.stdin.isatty())):
        job = f"a Slurm job called {env.get('SLURM_JOB_NAME')!r}"
        problem = f"srun started {env['SLURM_STEP_NUM_TASKS']} processes in {job}, each of which would train alone"
        raise UserError(f"{problem}: put SLURM_JOB_NAME=train before srun, or give salloc another --job-name")


def connect(meeting: Meeting, timeout_s: float) -> TCPStore:
    rank, _, address, port, served = meeting
    hosting = rank == 0 and not served
    settings = {"is_master": hosting, "multi_tenant": hosting, "wait_for_workers": False}
    try:
        store = TCPStore(address, port, timeout=timedelta(seconds=timeout_s), **settings)
    except RuntimeError as error:
        problem = "cannot listen" if hosting else f"did not find rank 0 within {timeout_s:g} s"
        problem = f"rank {rank} {problem} at {address}:{port} ({first_line(error)})"
        kind = UserError if hosting else TryAgainError
        raise kind(f"{problem}; look at what rank 0 says, or set MASTER_PORT to a free port") from error
    if hosting:
        _hosted.append(store)
    return store


def _listen(store: TCPStore, key: str, rank: int, timeout_s: float) -> Any:
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
        problem = f"rank {rank} heard nothing from rank 0 ({first_line(error)}); look at its output"
        raise TryAgainError(problem) from error
    if "error" in answer:
        raise from_rank(0, answer["error"], answer["kind"])
    return answer["value"]


def _announce(store: TCPStore, key: str, decide: Callable[[], Any], world_size: int, timeout_s: float) -> Any:
    """Say it to every rank of this round, and to none of an earlier one.

    torchrun's store outlives restarts and changes of membership, and so does what was said in it. So both sides have
    names of this round, and an answer counts where it was confirmed under both.
    """
    failure: Exception | None = None
    try:
        answer: dict[str, Any] = {"value": decide()}
    except Exception as error:
        failure, answer = error, {"error": first_line(error), "kind": kind_of(error)}
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
        came = f"ranks {sorted(missing)} of {world_size} did not come"
        raise TryAgainError(f"{came}; was the script started by torchrun or srun?")
    return answer["value"]
