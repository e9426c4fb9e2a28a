"""Starts that are cut short before the first step: no run folder is left in which nothing was learned."""

import functools
import os
import signal
import time

import pytest

from fmlit.cli import train
from fmlit.core.errors import TryAgainError
from fmlit.storage.run_folder import RunFolder
from fmlit.training import launch
from fmlit.training.signals import SECOND_AFTER_S
from tests.faults.jobs import Job

pytestmark = pytest.mark.faults
MOMENTS = {"claimed": (launch, "hold"), "building": (train.TrainingCLI, "_settings"), "built": (train, "describe_run")}


def _listens(rank: int) -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would all that these tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _signalled(rank: int, moment: str, name: str) -> None:
    _listens(rank)
    owner, function_name = MOMENTS[moment]
    function = getattr(owner, function_name)

    def interrupted(*args, **settings):
        os.kill(os.getpid(), signal.Signals[name])
        return function(*args, **settings)

    setattr(owner, function_name, interrupted)


@pytest.mark.parametrize("moment", ["claimed", "building", "built"])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_before_the_first_step_leaves_no_run(moment, name, code, tmp_path):
    (outcome,) = Job(tmp_path, fault=functools.partial(_signalled, moment=moment, name=name)).outcomes()
    assert outcome.code == code, outcome
    assert outcome.err == ("interrupted\n" if name == "SIGINT" else f"{name}: ended before the first step\n")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_that_is_resumed_keeps_its_folder_whatever_comes(tmp_path):
    Job(tmp_path, "--images=60").finish()
    fault = functools.partial(_signalled, moment="building", name="SIGTERM")
    (outcome,) = Job(tmp_path, "--images=120", fault=fault).outcomes()
    assert outcome.code == 143
    assert Job(tmp_path, "--images=120").finish()["images_seen"] == 120


def _stuck(rank: int) -> None:
    _listens(rank)

    def fit(*_, **__):
        print("stuck", flush=True)
        time.sleep(300)

    train.pl.Trainer.fit = fit


def test_a_second_signal_before_the_first_step_leaves_no_run(tmp_path):
    job, out = Job(tmp_path, fault=_stuck), tmp_path / "out-0"
    job.wait_until(lambda _: out.exists() and "stuck" in out.read_text())
    assert job.run.is_dir()
    job.signal(signal.SIGTERM)
    time.sleep(SECOND_AFTER_S + 0.5)
    job.signal(signal.SIGTERM)
    (outcome,) = job.outcomes()
    assert outcome.code == 143
    assert not job.run.exists()


def test_a_start_whose_other_processes_do_not_come_leaves_no_run(tmp_path, monkeypatch):
    def alone(decide, timeout_s):
        decide()
        raise TryAgainError("ranks [1] of 2 did not come")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "agree", alone)
        with pytest.raises(TryAgainError):
            launch.begin(tmp_path, "a")
        assert list(tmp_path.iterdir()) == []
        kept = RunFolder.claim(tmp_path, "a")
        with pytest.raises(TryAgainError):
            launch.begin(tmp_path, "a", resume=True)
        assert kept.path.is_dir()


def test_a_folder_that_another_launch_has_taken_is_not_removed(tmp_path, monkeypatch):
    def refuse(folder, terms):
        (folder.path / "lease.1").write_text("{}")  # which `--resume=auto` has found before this launch held it
        raise TryAgainError("in use")

    monkeypatch.setattr(launch, "hold", refuse)
    with pytest.raises(TryAgainError):
        launch.begin(tmp_path, "a")
    assert (tmp_path / "a" / "lease.1").is_file()
