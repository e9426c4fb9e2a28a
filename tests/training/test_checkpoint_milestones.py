"""Milestones: checkpoints at numbers of images that were named beforehand, kept for good."""

import multiprocessing
import os
import shutil
import socket
from datetime import datetime
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fmlit.core.errors import UserError
from fmlit.storage.checkpoints import find_damage, load, newest_valid
from fmlit.training.averages import EMA
from fmlit.training.callbacks import Checkpoint
from fmlit.training.callbacks.checkpoint import save
from tests.helpers.small_runs import digits_module, fit, names, same, weights
from tests.helpers.tiny_cli import train

multiprocessing.set_forkserver_preload(["fmlit.training.callbacks", "sklearn.datasets"])


class At(pl.Callback):
    """Does something at the end of the step that reaches a number of images."""

    def __init__(self, images_seen, action):
        self.images_seen, self.action = images_seen, action

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.images_seen == self.images_seen:
            self.action(trainer)


def kept(folder):
    return names(folder / "checkpoints", "milestone-*.ckpt")


class Saves:
    """Counts what is written."""

    def __init__(self, monkeypatch):
        self.names: list[str] = []
        monkeypatch.setattr("fmlit.training.callbacks.checkpoint.save", self)

    def __call__(self, trainer, path, on_error, *name):
        self.names.append(path.name)
        return save(trainer, path, on_error, *name)


@pytest.mark.parametrize(
    ("milestones", "seen"),
    [
        ([36], [36]),
        ([25], [36]),  # batches of 12: the first step at which 25 have been seen
        ([1, 2, 11, 12, 13], [12, 24]),  # one file for all that a step passes
        ([12, 84], [12, 84]),  # the last step
        ([500], []),
    ],
)
@pytest.mark.parametrize("every", [24, None])
def test_they_are_made_at_the_first_step_that_has_seen_so_many_images(milestones, seen, every, tmp_path, monkeypatch):
    saves = Saves(monkeypatch)
    fit(digits_module(), tmp_path, 7, Checkpoint(every, keep=1, milestones=milestones))
    expected = [f"milestone-{images:09d}.ckpt" for images in seen]
    assert kept(tmp_path) == expected  # though all others but one are gone
    assert [name for name in saves.names if name.startswith("milestone")] == expected  # each once
    assert len(saves.names) == len(expected) + (4 if every else 0)
    for name, images in zip(expected, seen, strict=True):
        assert not find_damage(tmp_path / "checkpoints" / name)
        assert load(tmp_path / "checkpoints" / name)["images_seen"] == images


def test_none_falls_between_two_steps(tmp_path):
    """A step of 12 images is accumulated from 3 batches of 4."""
    fit(digits_module(), tmp_path, 4, Checkpoint(None, milestones=[5, 26]), accumulate_grad_batches=3)
    assert kept(tmp_path) == ["milestone-000000012.ckpt", "milestone-000000036.ckpt"]
    assert load(tmp_path / "checkpoints" / "milestone-000000036.ckpt")["global_step"] == 3


def test_last_points_at_the_newest_of_both_kinds(tmp_path):
    folder, callback = tmp_path / "checkpoints", Checkpoint(24, milestones=[36])
    fit(digits_module(), tmp_path, 3, callback)
    assert os.readlink(folder / "last.ckpt") == "000000036.ckpt"  # due at the last step, too
    shutil.rmtree(folder)
    callback = Checkpoint(None, milestones=[24])
    fit(digits_module(), tmp_path, 3, callback)
    assert os.readlink(folder / "last.ckpt") == "milestone-000000024.ckpt"
    assert callback.newest == folder / "milestone-000000024.ckpt"


def test_a_run_goes_on_from_one_in_every_bit_and_does_not_make_it_again(tmp_path, monkeypatch):
    whole, resumed = digits_module(), digits_module()
    averages = EMA([50]), EMA([50])
    fit(whole, tmp_path / "whole", 6, averages[0], Checkpoint(12, milestones=[30, 60]))
    fit(digits_module(), tmp_path, 3, EMA([50]), Checkpoint(24, milestones=[30, 60]))
    for name in names(tmp_path / "checkpoints"):
        if not name.startswith("milestone"):
            os.unlink(tmp_path / "checkpoints" / name)
    milestone = newest_valid(tmp_path / "checkpoints")
    assert milestone.name == "milestone-000000036.ckpt"

    saves = Saves(monkeypatch)
    fit(resumed, tmp_path, 6, averages[1], Checkpoint(24, milestones=[30, 60]), resume=milestone)
    assert saves.names == ["000000048.ckpt", "milestone-000000060.ckpt", "000000072.ckpt"]
    assert same(weights(whole), weights(resumed))
    assert same(averages[0].averaged_weights()["ema_50"], averages[1].averaged_weights()["ema_50"])
    assert os.readlink(tmp_path / "checkpoints" / "last.ckpt") == "000000072.ckpt"


def test_one_that_a_kill_left_without_the_link_is_the_last(tmp_path):
    fit(digits_module(), tmp_path, 3, Checkpoint(24, milestones=[36]))
    folder = tmp_path / "checkpoints"
    for name in ("last.ckpt", "000000036.ckpt", "000000036.ckpt.sha256"):
        os.unlink(folder / name)
    fit(digits_module(), tmp_path, 3, Checkpoint(24, milestones=[36]), resume=folder / "milestone-000000036.ckpt")
    assert os.readlink(folder / "last.ckpt") == "milestone-000000036.ckpt"


def test_one_that_a_kill_has_prevented_is_made_up_for(tmp_path):
    """As when best.ckpt of that step was saved, and the power failed before the milestone was."""
    best = tmp_path / "best.ckpt"
    settings = {"milestones": [36, 60]}

    whole = digits_module()
    before = At(36, lambda trainer: trainer.save_checkpoint(best))
    fit(whole, tmp_path / "whole", 6, EMA([50]), before, Checkpoint(None, **settings))
    assert kept(tmp_path / "whole") == ["milestone-000000036.ckpt", "milestone-000000060.ckpt"]

    resumed = digits_module()
    fit(resumed, tmp_path, 6, EMA([50]), Checkpoint(None, **settings), resume=best)
    assert kept(tmp_path) == kept(tmp_path / "whole")
    assert same(weights(whole), weights(resumed))
    for name in kept(tmp_path):
        there, here = (load(folder / "checkpoints" / name) for folder in (tmp_path / "whole", tmp_path))
        assert same(there["state_dict"], here["state_dict"])
        assert same(there["ema"]["ema_50"], here["ema"]["ema_50"])
    again = digits_module()
    fit(again, tmp_path, 6, EMA([50]), Checkpoint(None), resume=tmp_path / "checkpoints" / "milestone-000000036.ckpt")
    assert same(weights(whole), weights(again))  # also from the one that was made up for


def test_a_checkpoint_from_before_there_were_milestones_is_gone_on_with(tmp_path):
    path = tmp_path / "old.ckpt"
    fit(digits_module(), tmp_path, 3, At(36, lambda trainer: trainer.save_checkpoint(path)))
    fit(digits_module(), tmp_path, 5, Checkpoint(None, milestones=[24, 48]), resume=path)
    assert kept(tmp_path) == ["milestone-000000048.ckpt"]  # 24 images are past


class FullDisk:
    """Saving fails from some number of images on."""

    def __init__(self, monkeypatch, images_seen):
        self.at = At(images_seen, lambda trainer: monkeypatch.setattr(torch, "save", self))

    def __call__(self, *arguments, **settings):
        raise OSError(28, "No space left on device")


def test_a_full_disk_ends_the_run_and_leaves_the_milestones_before(tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch, 48)
    with pytest.raises(OSError, match=r"cannot write checkpoint milestone-000000048\.ckpt"):
        fit(digits_module(), tmp_path, 6, disk.at, Checkpoint(None, milestones=[24, 48]))
    assert kept(tmp_path) == ["milestone-000000024.ckpt"]
    assert not find_damage(tmp_path / "checkpoints" / "last.ckpt")


def test_a_full_disk_is_a_warning_where_that_was_asked_for(tmp_path, monkeypatch, caplog):
    disk, module = FullDisk(monkeypatch, 48), digits_module()
    fit(module, tmp_path, 6, disk.at, Checkpoint(None, on_error="continue", milestones=[24, 48]))
    assert module.images_seen == 72
    assert kept(tmp_path) == ["milestone-000000024.ckpt"]
    assert [line for line in caplog.messages if "milestone-000000048.ckpt" in line and "training goes on" in line]


def test_a_model_that_has_come_apart_is_not_kept(tmp_path):
    module = digits_module()

    def spoil(trainer):
        module.run.guard.note(torch.tensor([torch.nan]))
        module.run.guard._bad_since.fill_(24)

    with pytest.raises(UserError, match="the gradient is not finite after 24 images"):
        fit(module, tmp_path, 4, At(24, spoil), Checkpoint(None, milestones=[24]))
    assert not kept(tmp_path)


def test_their_time_is_counted(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr("fmlit.training.hooks.time", clock)

    def slow(trainer, path, on_error, name=None):
        clock.now += 100
        return True

    monkeypatch.setattr("fmlit.training.callbacks.checkpoint.save", slow)
    callback = Checkpoint(24, milestones=[12, 24, 36])
    fit(digits_module(), tmp_path, 4, callback)
    assert callback.seconds == 500  # three milestones, and two of the interval


@pytest.mark.parametrize("milestones", [[0, 5], [-3], [10, 10], [20, 10]])
def test_what_are_no_milestones_is_named(milestones, tmp_path):
    with pytest.raises(ValueError, match=r"^checkpoint\.milestones must be positive numbers of images, each larger"):
        Checkpoint(milestones=milestones)
    text = "[" + ",".join(map(str, milestones)) + "]"
    assert train(tmp_path, f"--checkpoint.milestones={text}").error.startswith("checkpoint.milestones must be positive")


def test_a_recipe_names_them_and_a_resumed_run_keeps_to_them(tmp_path):
    """From the command line, where best.ckpt is saved before them and the checkpoint of the interval after."""
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    asked = "--checkpoint.milestones=[48,160,200]"
    assert train(tmp_path, asked, "--images=160").code == 0
    assert kept(folder.parent) == ["milestone-000000048.ckpt", "milestone-000000160.ckpt"]
    before = (folder / "milestone-000000160.ckpt").stat().st_mtime_ns
    outcome = train(tmp_path, asked, "--resume", "--images=320")
    assert outcome.summary["images_seen"] == 320
    assert kept(folder.parent) == [f"milestone-{seen:09d}.ckpt" for seen in (48, 160, 208)]
    assert (folder / "milestone-000000160.ckpt").stat().st_mtime_ns == before
    assert names(folder)[:3] == ["000000240.ckpt", "000000320.ckpt", "last.ckpt"]


class Unsavable(pl.Callback):
    """Has a state that no checkpoint may hold, from the second step on."""

    def on_train_batch_end(self, trainer, *_):
        self.state_dict = lambda: {"begun": datetime.now()} if trainer.global_step > 2 else {}


def worker(rank, port, folder, on_error):
    """One of two processes that torchrun starts; the disk of rank 0 is full from 48 images on, or a state is wrong."""
    torch.set_num_threads(1)
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({key: str(value) for key, value in {**local, **meeting}.items()})
    module, outcome = digits_module(), "trained"
    unsavable = on_error == "unsavable"
    fault = Unsavable() if unsavable else FullDisk(pytest.MonkeyPatch(), 48 if rank == 0 else -1).at
    callback = Checkpoint(None, on_error="continue" if unsavable else on_error, milestones=[24, 48])
    try:
        fit(module, folder, 6, fault, callback, devices=2, strategy="ddp")
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    (folder / f"outcome-{rank}").write_text(f"{module.images_seen} {callback.newest} {outcome}")
    dist.destroy_process_group()


@pytest.mark.parametrize("on_error", ["abort", "continue", "unsavable"])
def test_ranks_save_them_together_and_fail_together(on_error, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(worker, (port, tmp_path, on_error), 2, start_method="forkserver")
    assert kept(tmp_path) == ["milestone-000000024.ckpt"]
    assert load(tmp_path / "checkpoints" / "last.ckpt")["images_seen"] == 24
    for rank in range(2):
        seen, newest, outcome = (tmp_path / f"outcome-{rank}").read_text().split(maxsplit=2)
        assert newest == str(tmp_path / "checkpoints" / "milestone-000000024.ckpt")
        if on_error == "continue":
            assert (seen, outcome) == ("72", "trained")
        elif on_error == "abort":
            assert seen == "48"
            assert outcome.startswith("StorageError: cannot write checkpoint milestone-000000048.ckpt")
        else:
            assert seen == "48"
            assert "the checkpoint would hold datetime.datetime, which could not be loaded again" in outcome
