import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from fmlit.core.errors import FileError, UserError
from fmlit.storage.run_folder import RunFolder
from fmlit.training import rendezvous
from fmlit.training.launch import begin
from fmlit.training.rendezvous import agree

LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "FMLIT_", "MASTER_", "LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    yield
    for name in list(os.environ):  # what agree and Lightning's environments export
        if name.startswith(LAUNCHERS):
            del os.environ[name]


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def start(function, out, **env):
    """Run in a forked process with these variables; its result or error ends up in a file of ``out``."""

    def child():
        os.environ.update(env)
        rendezvous._calls = itertools.count()  # a process of its own starts counting anew
        try:
            result = function()
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        (out / str(os.getpid())).write_text(str(result))
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def results(processes, out):
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [(out / str(process.pid)).read_text() for process in processes]


# --- folders


def test_occupied_names_are_numbered(tmp_path):
    folders = [RunFolder.claim(tmp_path / "runs", "quickstart") for _ in range(3)]
    assert [folder.path.name for folder in folders] == ["quickstart", "quickstart-002", "quickstart-003"]
    assert RunFolder.newest(tmp_path / "runs", "quickstart") == folders[2]
    folders[0].record_file.unlink()
    folders[0].path.rmdir()
    # The highest number is always the newest.
    assert RunFolder.claim(tmp_path / "runs", "quickstart").path.name == "quickstart-004"


def test_name_that_looks_like_a_number_is_another_run(tmp_path):
    assert RunFolder.claim(tmp_path, "imagenet").path.name == "imagenet"
    assert RunFolder.claim(tmp_path, "imagenet-256").path.name == "imagenet-256"
    assert RunFolder.newest(tmp_path, "imagenet").path.name == "imagenet"
    assert RunFolder.claim(tmp_path, "imagenet").path.name == "imagenet-002"
    # A run can be named by its folder.
    assert RunFolder.newest(tmp_path, "imagenet-002").path.name == "imagenet-002"
    assert RunFolder.claim(tmp_path, "imagenet-256").path.name == "imagenet-256-002"


def test_nothing_of_an_occupied_folder_is_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("precious")
    (tmp_path / "file").write_text("")
    assert RunFolder.claim(tmp_path, "mine").path.name == "mine-002"
    assert RunFolder.claim(tmp_path, "file").path.name == "file-002"
    assert (tmp_path / "mine" / "run.json").read_text() == "precious"


@pytest.mark.parametrize("name", ["", " ", ".", "..", "~", "~root", "a/b", "/a", "a\\b", "a\nb", "a\0"])
def test_name_must_be_a_folder_name(tmp_path, name):
    with pytest.raises(ValueError, match="plain folder name"):
        RunFolder.claim(tmp_path, name)


def test_no_run_to_resume(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"no run named 'mnist' in {root}"):
            RunFolder.newest(root, "mnist")
    with pytest.raises(ValueError, match="without --resume"):
        begin(tmp_path, "mnist", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_root_that_cannot_be_written(tmp_path, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cannot create a run folder in {tmp_path / 'file'}"):
        RunFolder.claim(tmp_path / "file", "mnist")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)

    def without_rights():
        if os.getuid() == 0:
            os.setegid(65534)
            os.seteuid(65534)
        try:
            return RunFolder.claim(folder, "mnist")
        finally:
            os.seteuid(os.getuid())

    (message,) = results([start(without_rights, out)], out)
    folder.rmdir()
    assert message == f"FileError: cannot create a run folder in {folder}: Permission denied; choose another"


def test_full_disk_leaves_no_folder(tmp_path, out):
    def full():
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            return RunFolder.claim(tmp_path / "runs", "mnist")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    (message,) = results([start(full, out)], out)
    where = tmp_path / "runs"
    assert message == f"StorageError: cannot create a run folder in {where}: File too large; choose another"
    assert list((tmp_path / "runs").iterdir()) == []


def test_racing_jobs_never_share_a_folder(tmp_path, out):
    at = time.time() + 0.5

    def race():
        time.sleep(max(0.0, at - time.time()))
        return [RunFolder.claim(tmp_path / "runs", "race").path.name for _ in range(20)]

    claimed = results([start(race, out) for _ in range(4)], out)
    names = [name for line in claimed for name in json.loads(line.replace("'", '"'))]
    assert len(set(names)) == 80
    assert set(names) == {"race"} | {f"race-{number:03d}" for number in range(2, 81)}


def test_wandb_id_is_made_once(tmp_path):
    first, second = RunFolder.claim(tmp_path, "a"), RunFolder.claim(tmp_path, "a")
    assert first.wandb_id() == first.wandb_id()
    assert first.wandb_id() != second.wandb_id()
    assert json.loads((first.path / "run.json").read_text()) == {"name": "a", "wandb_id": first.wandb_id()}
    assert RunFolder.newest(tmp_path, "a") == second


def test_damaged_run_file_is_named(tmp_path):
    folder = RunFolder.claim(tmp_path, "a")
    for content in ("", "[1]", "{"):
        (folder.path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run\.json is damaged"):
            folder.wandb_id()


def test_every_path_of_a_run_lies_in_its_folder(tmp_path):
    run = RunFolder(tmp_path / "a")
    paths = {
        "config.yaml": run.config,
        "metrics.csv": run.metrics,
        "run.json": run.record_file,
        "samples": run.samples,
        "samples/000000320.png": run.sample_grid(320),
        "evaluation": run.evaluation,
        "export": run.export,
        "checkpoints": run.checkpoints,
        "checkpoints/last.ckpt": run.last,
        "checkpoints/best.ckpt": run.best,
        "checkpoints/000000320.ckpt": run.checkpoint(320),
        "checkpoints/milestone-1000000012.ckpt": run.milestone(1_000_000_012),
    }
    assert {name: tmp_path / "a" / name for name in paths} == paths
    assert Path(run) == tmp_path / "a"
    assert f"{run}" == str(tmp_path / "a")


def test_a_checkpoint_knows_its_run(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "a")
    assert RunFolder.of_checkpoint(run.last) == RunFolder.of_checkpoint(run.milestone(12)) == run
    assert RunFolder.of_checkpoint(tmp_path / "given" / "model.ckpt") == RunFolder(tmp_path / "given")
    run.checkpoints.mkdir(parents=True)
    monkeypatch.chdir(run.checkpoints)
    assert RunFolder.of_checkpoint(Path("last.ckpt")).evaluation.resolve() == run.evaluation.resolve()


def test_saved_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    run = RunFolder(tmp_path)
    assert not run.has_checkpoints()
    run.checkpoints.mkdir()
    for path in (run.checkpoint(1_000_000_012), run.checkpoint(999_999_999), run.milestone(12), run.best, run.last):
        path.touch()
    assert run.saved_images() == [999_999_999, 1_000_000_012]
    assert run.has_checkpoints()


def test_drawings_are_numbered(tmp_path):
    run = RunFolder(tmp_path)
    assert run.next_drawing() == tmp_path / "samples" / "drawn-001.png"
    run.samples.mkdir()
    for name in ("drawn-001.png", "drawn-1234.png", "drawn-cats.png", "000064000.png"):
        (run.samples / name).touch()
    assert run.next_drawing().name == "drawn-1235.png"


# --- coming back


def launched(monkeypatch, **env):
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))


def test_plain_launches_get_new_folders_or_resume(tmp_path):
    assert begin(tmp_path, "a") == (RunFolder(tmp_path / "a"), False)
    assert begin(tmp_path, "a") == (RunFolder(tmp_path / "a-002"), False)
    assert begin(str(tmp_path), "a", resume=True) == (RunFolder(tmp_path / "a-002"), True)


def test_requeued_job_comes_back_to_its_folder(tmp_path, monkeypatch):
    def job(job_id, restart=0, resume=False, **env):
        restarted = {"SLURM_RESTART_COUNT": restart} if restart else {}
        launched(monkeypatch, SLURM_JOB_ID=job_id, **restarted, **env)
        folder, resumed = begin(tmp_path, "a", resume)
        return folder.path.name, resumed

    assert job(7, SLURM_STEP_ID=0) == ("a", False)
    assert job(8, SLURM_STEP_ID=0, SLURM_ARRAY_JOB_ID=7, SLURM_ARRAY_TASK_ID=1) == ("a-002", False)
    assert job(7, SLURM_STEP_ID=1) == ("a-003", False)  # a second srun of the same job
    assert job(7, restart=1, SLURM_STEP_ID=0) == ("a", True)
    assert job(7, restart=1, SLURM_STEP_ID=1) == ("a-003", True)
    assert job(8, restart=2, SLURM_STEP_ID=0) == ("a-002", True)
    assert job(9, restart=1, SLURM_STEP_ID=0) == ("a-004", False)  # requeued before it had a folder
    assert job(7, SLURM_STEP_ID=0) == ("a-005", False)  # another cluster's job 7: not a restart
    assert job(10, resume=True) == ("a-005", True)
    assert job(11) == ("a-006", False)
    assert job(10, restart=1, resume=True) == ("a-005", True)  # where it was, not the newest


def test_torchrun_restart_comes_back_to_its_folder(tmp_path, monkeypatch):
    def attempt(run_id, count, port=29500):
        launched(
            monkeypatch,
            TORCHELASTIC_RUN_ID=run_id,
            TORCHELASTIC_RESTART_COUNT=count,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        folder, resumed = begin(tmp_path, "a")
        return folder.path.name, resumed

    assert attempt("x", 0) == ("a", False)
    assert attempt("none", 0, 29501) == ("a-002", False)
    assert attempt("none", 0, 29502) == ("a-003", False)
    assert attempt("x", 1, 40000) == ("a", True)  # rank 0 may be on another node now
    assert attempt("none", 1, 29501) == ("a-002", True)
    assert attempt("x", 0) == ("a-004", False)  # the same id, typed again


# --- agreeing


def test_child_of_lightnings_launcher_hears_from_its_parent(out, monkeypatch):
    monkeypatch.setattr(rendezvous, "_calls", itertools.count())
    assert agree(lambda: "first") == "first"
    assert agree(lambda: "second") == "second"
    child = start(lambda: [agree(lambda: "wrong"), agree(lambda: "wrong")], out, LOCAL_RANK="1", WORLD_SIZE="2")
    stray = start(lambda: [agree(lambda: "wrong") for _ in range(3)], out, LOCAL_RANK="1")
    heard, error = results([child, stray], out)
    assert heard == "['first', 'second']"
    assert error.startswith("UserError: LOCAL_RANK is 1, but no process has decided")


def test_several_nodes_need_a_launcher(monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(ValueError, match=r"NODE_RANK is 1.*torchrun or srun"):
        agree(lambda: "wrong")


def slurm_task(rank, port, tasks=2):
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.mark.parametrize("name", ["interactive", "bash"])
def test_tasks_in_a_job_where_lightning_ignores_slurm_are_refused(monkeypatch, name):
    steps = slurm_task(0, 12345) | {"SLURM_JOB_NAME": name, "SLURM_STEP_NUM_TASKS": "2"}
    steps = {key: value for key, value in steps.items() if not key.startswith("MASTER")}
    for rank in (0, 1):
        launched(monkeypatch, **(steps | {"SLURM_PROCID": str(rank)}))
        with pytest.raises(UserError, match=f"2 processes in a Slurm job called '{name}'.*SLURM_JOB_NAME="):
            agree(lambda: "alone")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)  # the shell of srun --pty
    launched(monkeypatch, **steps)
    assert agree(lambda: "a shell") == "a shell"
    launched(monkeypatch, **(steps | {"SLURM_STEP_NUM_TASKS": "1"}))
    assert agree(lambda: "one task") == "one task"


def test_slurm_tasks_agree_and_the_process_group_still_starts(tmp_path, out):
    port = find_free_network_port()

    def task():
        folder = begin(tmp_path, "a")[0].path.name
        again = agree(lambda: str(os.getpid()))
        rank = int(os.environ["SLURM_PROCID"])
        dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=30))
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, (folder, again))
        return [(folder, again), *gathered]

    late = start(task, out, **slurm_task(1, port))
    time.sleep(0.3)
    first = start(task, out, **slurm_task(0, port))
    expected = str([("a", str(first.pid))] * 3)
    assert results([late, first], out) == [expected, expected]


@pytest.mark.parametrize(("kind", "elsewhere"), [(FileError, "UserError"), (OSError, "RuntimeError")])
def test_failure_of_rank_0_reaches_all(out, kind, elsewhere):
    port = find_free_network_port()

    def fail():
        raise kind("no space\nleft")

    tasks = [start(lambda: agree(fail, timeout_s=20), out, **slurm_task(rank, port, 3)) for rank in range(3)]
    assert results(tasks, out) == [f"{kind.__name__}: no space\nleft", *[f"{elsewhere}: rank 0: no space"] * 2]


def test_missing_processes_are_named(out):
    port = find_free_network_port()

    def task():
        return agree(lambda: "x", timeout_s=1)

    tasks = [start(task, out, **slurm_task(rank, port, 4)) for rank in (0, 2)]
    assert results(tasks, out) == [
        "TryAgainError: ranks [1, 3] of 4 did not come; was the script started by torchrun or srun?",
        "x",
    ]
    (alone,) = results([start(task, out, **slurm_task(1, find_free_network_port()))], out)
    assert alone.startswith("TryAgainError: rank 1 did not find rank 0 within 1 s at 127.0.0.1:")
    assert "\n" not in alone


SCRIPT = """
import os, pathlib, sys, time
from fmlit.training import rendezvous
out, restarts = pathlib.Path(sys.argv[1]), int(sys.argv[2])
rank, attempt = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
agreed = [rendezvous.agree(lambda: f"{call} {os.getpid()}") for call in range(2)]
(out / f"{attempt}-{rank}").write_text(" ".join(agreed))
if attempt < restarts:
    while not ((out / f"{attempt}-0").exists() and (out / f"{attempt}-1").exists()):
        time.sleep(0.01)
    os._exit(3)
"""


@pytest.mark.parametrize("restarts", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_torchrun_processes_agree_anew_in_each_attempt(tmp_path, out, restarts):
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    command = [*torchrun, *options, str(tmp_path / "script.py"), str(out), str(restarts)]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = {file.name: file.read_text().split() for file in out.iterdir()}
    attempts = range(restarts + 1)
    assert said.keys() == {f"{attempt}-{rank}" for attempt in attempts for rank in range(2)}
    assert all(said[f"{attempt}-0"] == said[f"{attempt}-1"] for attempt in attempts)
    assert all((words[0], words[2]) == ("0", "1") for words in said.values())
    assert len({words[1] for words in said.values()}) == restarts + 1
