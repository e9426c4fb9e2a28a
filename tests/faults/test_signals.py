"""Signals: a checkpoint, the agreement of all ranks, a requeued job, the exit code; and what kill -9 leaves behind."""

import os
import pty
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from PIL import Image

from fmlit.sampling.samplers import ODESampler
from fmlit.training.callbacks import SampleGrid
from fmlit.training.modules import FlowMatchingModule
from fmlit.training.signals import SECOND_AFTER_S
from tests.faults.jobs import Job, assert_same_training
from tests.faults.soak import soak

pytestmark = pytest.mark.faults
IN_THE_MIDDLE = 240  # images, of 2,400


def trained(job: Job) -> bool:
    return any(images >= IN_THE_MIDDLE for images in job.checkpoints)


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def whole(request, tmp_path_factory):
    """The number of ranks, and the last checkpoint of a run that nothing has interrupted."""
    job = Job(tmp_path_factory.mktemp("whole"), ranks=request.param)
    return request.param, job.finish()


def test_a_killed_run_ends_in_the_weights_of_an_uninterrupted_one(whole, tmp_path):
    ranks, expected = whole
    for images in (IN_THE_MIDDLE, 900, 1500):
        job = Job(tmp_path, ranks=ranks)
        job.wait_until(lambda job, images=images: any(seen >= images for seen in job.checkpoints))
        job.signal(signal.SIGKILL)
        job.outcomes()
    assert_same_training(Job(tmp_path, ranks=ranks).finish(), expected)


def _listens(rank: int) -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would all that these tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


FIRST = "saving a checkpoint before the run ends; a second signal ends it at once\n"


@pytest.mark.parametrize(
    ("name", "code", "ranks", "target"),
    [
        ("SIGTERM", 143, 1, 0),
        ("SIGTERM", 143, 2, 0),
        ("SIGTERM", 143, 2, 1),
        ("SIGINT", 130, 1, 0),
        ("SIGINT", 130, 2, 1),
        ("SIGHUP", 129, 1, 0),
    ],
)
def test_a_signal_to_any_rank_ends_all_with_one_checkpoint(name, code, ranks, target, tmp_path):
    job = Job(tmp_path, ranks=ranks, fault=_listens)
    job.wait_until(trained)
    job.signal(signal.Signals[name], target)
    first, *others = job.outcomes()
    assert [outcome.code for outcome in (first, *others)] == [code] * ranks
    saved = job.last()["images_seen"]
    path = job.run / "checkpoints" / f"{saved:09d}.ckpt"
    verb = "preempted" if name == "SIGTERM" else "interrupted"
    answer = f"{name}: {FIRST}" if target == 0 else ""
    assert first.err == f"{answer}{verb} by {name}: saved {path}; --resume goes on\n"
    assert all(outcome.err == "" for outcome in others)
    assert f'"preempted": "{name}"' in first.out.splitlines()[-1]
    assert job.rows == 1 + saved // 12  # not a step after it


def test_ctrl_c_in_a_terminal_also_reaches_the_data_workers_and_counts_once(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(24):
        Image.effect_noise((8, 8), 50).save(tmp_path / "pictures" / f"{number}.png")
    data = ("--data=ImageFolder", f"--data.root={tmp_path / 'pictures'}", "--data.size=8", "--data.num_workers=2")
    job = Job(tmp_path, *data, "--data.batch_size=12", fault=_listens)
    job.wait_until(trained)
    os.killpg(job.processes[0].pid, signal.SIGINT)
    (outcome,) = job.outcomes()
    assert outcome.code == 130
    saved = job.run / "checkpoints" / f"{job.last()['images_seen']:09d}.ckpt"
    assert outcome.err == f"SIGINT: {FIRST}interrupted by SIGINT: saved {saved}; --resume goes on\n"


def _on_a_terminal(rank: int) -> None:
    """As under ssh: what is printed after the connection is lost fails."""
    _listens(rank)
    ours, theirs = pty.openpty()
    os.dup2(theirs, 1)
    os.dup2(theirs, 2)
    loss = FlowMatchingModule.loss

    def hang_up(self, *args):
        nonlocal ours
        if self.images_seen >= IN_THE_MIDDLE and ours:
            os.close(ours)
            ours = 0
            os.kill(os.getpid(), signal.SIGHUP)
        return loss(self, *args)

    FlowMatchingModule.loss = hang_up


def test_a_lost_terminal_loses_no_more_than_what_is_printed(tmp_path):
    job = Job(tmp_path, fault=_on_a_terminal)
    (outcome,) = job.outcomes()
    assert outcome.code == 129
    assert job.last()["images_seen"] == IN_THE_MIDDLE + 12


def _stuck(rank: int) -> None:
    """In the middle of training, in a call that runs no Python handlers while it lasts."""
    _listens(rank)
    loss = FlowMatchingModule.loss

    def stuck(self, *args):
        if self.images_seen >= 2 * IN_THE_MIDDLE:
            print("stuck", flush=True)
            torch.distributed.TCPStore("127.0.0.1", 0, is_master=True).wait(["never"], timedelta(seconds=300))
        return loss(self, *args)

    FlowMatchingModule.loss = stuck


@pytest.mark.parametrize(
    ("once", "twice", "code"),
    [("SIGTERM", "SIGTERM", 143), ("SIGTERM", "SIGINT", 130), ("SIGINT", "SIGINT", 130), ("SIGHUP", "SIGHUP", 129)],
)
def test_a_second_signal_ends_a_stuck_run_at_once(once, twice, code, tmp_path):
    job = Job(tmp_path, fault=_stuck)
    out = tmp_path / "out-0"
    job.wait_until(lambda job: out.exists() and "stuck" in out.read_text())
    before = job.checkpoints
    job.signal(signal.Signals[once])
    job.signal(signal.Signals[once])  # a launcher passes on what the process has had already
    time.sleep(SECOND_AFTER_S + 0.5)
    assert job.processes[0].is_alive()
    job.signal(signal.Signals[twice])
    (outcome,) = job.outcomes(timeout_s=10)
    assert outcome.code == code
    assert outcome.err == f"{once}: {FIRST}{twice}: a second signal, ended at once\n"
    assert job.checkpoints == before
    assert not list(job.run.rglob("*.partial"))


def test_a_preempted_run_ends_in_the_weights_of_an_uninterrupted_one(whole, tmp_path):
    ranks, expected = whole
    job = Job(tmp_path, ranks=ranks)
    job.wait_until(trained)
    job.signal(signal.SIGUSR1)  # as Slurm does, to all
    assert {outcome.code for outcome in job.outcomes()} == {143}
    assert_same_training(Job(tmp_path, ranks=ranks).finish(), expected)


def _signalled_while_sampling(rank: int) -> None:
    sample = ODESampler.sample

    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGUSR1)
        return sample(self, *args, **kwargs)

    ODESampler.sample = interrupted


def test_a_signal_while_sampling_waits_until_the_picture_is_complete(tmp_path):
    options = ("--samples.every=120", "--samples.columns=2", "--samples.sampler.steps=3")
    job = Job(tmp_path, *options, fault=_signalled_while_sampling)
    (outcome,) = job.outcomes()
    assert outcome.code == 143
    assert [path.name for path in (job.run / "samples").iterdir()] == ["000000120.png"]
    saved = job.last()
    assert saved["images_seen"] == 120
    plain = Job(tmp_path / "plain", *options, "--images=120") if (tmp_path / "plain").mkdir() is None else None
    expected = plain.finish()
    assert_same_training(saved, expected)  # weights and averages are not mixed up
    names = [name for name in saved["state_dict"] if name.startswith("model.net.")]
    average = saved["ema"]["ema_200"]
    assert any(not torch.equal(saved["state_dict"][name], average[name.removeprefix("model.net.")]) for name in names)


def _scontrol(folder: Path, code: int = 0) -> dict[str, str]:
    """A Slurm job's environment with a scontrol that writes down how it was called."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\necho "Invalid job id" >&2\nexit {code}\n')
    program.chmod(0o755)
    return {"SLURM_JOB_ID": "17", "PATH": f"{program.parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("case", "calls", "said"),
    [
        ("job", ["requeue 17"], "job 17 is requeued"),
        ("array", ["requeue 12_3"], "job 12_3 is requeued"),
        ("failing", ["requeue 17"], "job 17 is not requeued: scontrol said: Invalid job id; sbatch it again"),
        ("missing", [], "job 17 is not requeued: there is no scontrol here; sbatch it again, with --resume"),
        ("no slurm", [], "not requeued, because this is not a Slurm job; --resume continues the run"),
        ("cancelled", [], "--resume goes on"),
    ],
)
def test_sigusr1_requeues_a_slurm_job(case, calls, said, tmp_path):
    environment = _scontrol(tmp_path, code=1 if case == "failing" else 0)
    if case == "array":
        environment |= {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    if case == "missing":
        environment["PATH"] = str(tmp_path)
    if case == "no slurm":
        environment = {}
    job = Job(tmp_path, environment=environment)
    job.wait_until(trained)
    job.signal(signal.SIGTERM if case == "cancelled" else signal.SIGUSR1)
    (outcome,) = job.outcomes()
    assert outcome.code == 143
    assert said in outcome.err
    assert job.last()["images_seen"] >= IN_THE_MIDDLE
    log = tmp_path / "calls"
    assert (log.read_text().splitlines() if log.exists() else []) == calls


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other(victim, tmp_path):
    job = Job(tmp_path, ranks=2)
    job.wait_until(trained)
    job.signal(signal.SIGKILL, victim)
    outcomes = job.outcomes(timeout_s=60)
    survivor = outcomes[1 - victim]
    assert outcomes[victim].code == -9
    assert survivor.code == 1  # it has ended by itself; 2 would say that another try is useless
    assert "lost another process" in survivor.err


def _draws_nothing(rank: int) -> None:
    def sample(self, *args, **kwargs):
        raise RuntimeError("no memory left for the picture")

    if rank == 1:
        SampleGrid._draw.__globals__["generate"] = lambda *args: iter([sample(None)])


def test_an_error_of_one_rank_while_sampling_ends_both_and_is_named(tmp_path):
    options = ("--samples.every=120", "--samples.columns=2", "--samples.sampler.steps=3")
    outcomes = Job(tmp_path, *options, ranks=2, fault=_draws_nothing).outcomes()
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert "RuntimeError: no memory left for the picture" in outcomes[1].err
    assert "RuntimeError: rank 1: no memory left for the picture" in outcomes[0].err


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_short_soak(ranks, tmp_path):
    assert soak(tmp_path, kills=8, ranks=ranks).late > 0


def test_a_preempted_run_goes_on_in_the_same_wandb_run(tmp_path):
    options = ("--trainer.logger=fmlit.WandbLogger", "--images=600")
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    job = Job(tmp_path, *options, environment=environment)
    job.wait_until(trained)
    job.signal(signal.SIGTERM)
    (outcome,) = job.outcomes()
    assert outcome.code == 143
    assert "no longer recording" not in outcome.err
    Job(tmp_path, *options, environment=environment).finish()
    ids = [path.name.rpartition("-")[2] for path in (job.run / "wandb").glob("offline-run-*")]
    assert len(ids) == 2
    assert len(set(ids)) == 1
