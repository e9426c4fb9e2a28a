"""Failures in the middle of training: gradients that are not finite, full disks."""

import hashlib
import os
import resource
import signal
import threading

import pytest
import torch

from fmlit.data.downloads import OfficialFiles
from fmlit.training.modules import FlowMatchingModule
from tests.faults.jobs import Job

pytestmark = pytest.mark.faults


def _not_finite(rank: int) -> None:
    loss = FlowMatchingModule.loss

    def broken(self, *args):
        losses = loss(self, *args)
        return losses * torch.nan if self.images_seen >= 300 and rank == int(os.environ["WORLD_SIZE"]) - 1 else losses

    FlowMatchingModule.loss = broken


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_step(ranks, tmp_path):
    job = Job(tmp_path, ranks=ranks, fault=_not_finite, environment={"WORLD_SIZE": str(ranks)} if ranks == 1 else None)
    first, *others = job.outcomes()
    assert [outcome.code for outcome in (first, *others)] == [2] * ranks
    assert first.err.startswith(
        f"error: the gradient is not finite after 312 images, where the loss was not finite on rank {ranks - 1}; "
    )
    last = job.last()
    assert last["images_seen"] == 300
    assert all(torch.isfinite(value).all() for value in last["state_dict"].values())


def _disk_full_after_100_kb(rank: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_ends_the_run_with_one_line_and_leaves_what_was_there(tmp_path):
    healthy = Job(tmp_path, "--images=60")
    healthy.finish()
    for ranks in (1, 2):
        outcomes = Job(tmp_path, ranks=ranks, fault=_disk_full_after_100_kb).outcomes()
        assert [outcome.code for outcome in outcomes] == [75] * ranks
        line = outcomes[0].err.splitlines()[-1]
        assert line.startswith("error: cannot write checkpoint 000000120.ckpt in ")
        assert "File too large; earlier checkpoints are untouched; free space there" in line
        assert healthy.last()["images_seen"] == 60
        assert not list(tmp_path.rglob("*.partial"))


def _disk_full_after_1_kb(rank: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))


def test_a_disk_without_room_for_the_configuration_ends_the_run_with_one_line(tmp_path):
    (outcome,) = Job(tmp_path, fault=_disk_full_after_1_kb).outcomes()
    assert outcome.code == 75
    assert "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1].startswith(
        f"error: cannot write {tmp_path}/runs/job/config.yaml: File too large"
    )


def test_a_run_may_go_on_without_a_checkpoint_but_not_end_without_one(tmp_path):
    options = ("--images=240", "--checkpoint.on_error=continue")
    Job(tmp_path, "--images=60").finish()
    for ranks in (1, 2):
        job = Job(tmp_path, *options, ranks=ranks, fault=_disk_full_after_100_kb)
        outcomes = job.outcomes()
        assert [outcome.code for outcome in outcomes] == [75] * ranks
        assert outcomes[0].err.count("training goes on") == 3  # after 120, 180 and 240 images
        assert "error: cannot write checkpoint 000000240.ckpt in " in outcomes[0].err
        assert job.last()["images_seen"] == 60
    assert Job(tmp_path, *options).finish()["images_seen"] == 240


def test_two_jobs_that_download_at_once_leave_one_whole_copy(tmp_path):
    content = os.urandom(100_000)
    files = OfficialFiles("Noise", tmp_path, "noise", {"file": hashlib.md5(content).hexdigest()}, "md5")
    both, calls, errors = threading.Barrier(2), [], []

    def fetch(root):
        both.wait(timeout=30)  # neither has finished when the other begins
        calls.append(root)
        (root / "noise").mkdir(parents=True, exist_ok=True)
        (root / "noise" / "file").write_bytes(content)

    def job():
        try:
            files.download_missing(fetch)
            files.check()
        except Exception as error:
            errors.append(error)

    jobs = [threading.Thread(target=job) for _ in range(2)]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join()
    assert errors == []
    assert len(set(calls)) == 2  # each in a folder of its own
    assert [path.name for path in tmp_path.rglob("*")] == ["noise", "file"]


@pytest.mark.parametrize("across", ["false", "true"])
def test_a_recipe_that_several_processes_change_says_so(across, tmp_path):
    groups = ("--model.draws.coupling=OptimalTransportCoupling", "--model.draws.coupling.group_size=12")
    first, _ = Job(
        tmp_path, "--images=24", *groups, f"--model.draws.coupling.across_ranks={across}", ranks=2
    ).outcomes()
    assert first.code == 0
    warned = "set across_ranks: true to keep the recipe" in first.err
    assert warned is (across == "false")


def test_a_link_that_a_kill_left_behind_is_mended(tmp_path):
    job = Job(tmp_path, "--images=120")
    job.finish()
    link = job.run / "checkpoints" / "last.ckpt"
    link.unlink()
    link.symlink_to("000000060.ckpt")  # a kill came between the checkpoint and the link
    assert Job(tmp_path, "--images=120").finish()["images_seen"] == 120
