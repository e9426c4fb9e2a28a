import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from fmlit.storage.checkpoints import find_damage, load
from fmlit.training.averages import EMA
from fmlit.training.callbacks import Checkpoint, ProgressBar, SampleGrid, TrainingLog
from fmlit.training.hooks import EveryImages
from tests.helpers.small_runs import Memory, digits_module, fit, names, same, weights


class Recorder(EveryImages):
    """Keeps when it acted, and makes sure that it was not in the middle of a step."""

    def __init__(self, every: int | None) -> None:
        super().__init__(every)
        self.moments: list[int] = []

    def act(self, trainer, module):
        assert not trainer.fit_loop._should_accumulate()
        self.moments.append(module.images_seen)


class At(pl.Callback):
    """Does something at the end of the step that reaches a number of images."""

    def __init__(self, images_seen: int, action: Callable[[pl.Trainer], Any]) -> None:
        self.images_seen, self.action = images_seen, action

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.images_seen == self.images_seen:
            self.action(trainer)


# When callbacks act


@pytest.mark.parametrize(
    ("every", "moments"),
    [
        (24, [24, 48, 72, 84]),  # the last step always
        (30, [36, 60, 84]),  # where a multiple is passed: batches of 12 do not divide 30
        (5, [12, 24, 36, 48, 60, 72, 84]),  # at most once per step
        (42, [48, 84]),  # the last step is one that is due anyway
        (1000, [84]),
        (None, []),
    ],
)
def test_callbacks_act_by_images_seen(every, moments, tmp_path):
    recorder = Recorder(every)
    fit(digits_module(), tmp_path, 7, recorder)
    assert recorder.moments == moments


def test_callbacks_act_between_steps_only(tmp_path):
    recorder = Recorder(5)  # less than a micro-batch
    fit(digits_module(), tmp_path, 4, recorder, accumulate_grad_batches=2)
    assert recorder.moments == [12, 24, 36, 48]


def test_callbacks_act_at_an_early_end(tmp_path):
    recorder = Recorder(24)
    fit(digits_module(), tmp_path, 9, recorder, At(36, lambda trainer: setattr(trainer, "should_stop", True)))
    assert recorder.moments == [24, 36]


def test_callbacks_go_on_after_a_resume_as_if_nothing_had_been(tmp_path):
    path = tmp_path / "a.ckpt"
    fit(digits_module(), tmp_path, 3, Recorder(30)).save_checkpoint(path)  # at 36 images, where 30 are passed
    recorder = Recorder(30)
    fit(digits_module(), tmp_path, 6, recorder, resume=path)
    assert recorder.moments == [60, 72]
    finished = Recorder(30)
    fit(digits_module(), tmp_path, 3, finished, resume=path)  # nothing is left to do
    assert finished.moments == []


@pytest.mark.parametrize("every", [0, -5])
def test_an_interval_that_is_none_is_named(every):
    with pytest.raises(ValueError, match=f"every must be a positive number of images, or null for never, got {every}"):
        SampleGrid(every)


# Checkpoints


def test_the_newest_checkpoints_are_kept_and_last_points_at_the_newest(tmp_path):
    callback, folder = Checkpoint(24, keep=2), tmp_path / "checkpoints"
    module = digits_module()
    fit(module, tmp_path, 9, EMA(), callback)
    assert names(folder) == ["000000096.ckpt", "000000108.ckpt", "last.ckpt"]
    assert names(folder, "*.sha256") == ["000000096.ckpt.sha256", "000000108.ckpt.sha256"]
    assert os.readlink(folder / "last.ckpt") == "000000108.ckpt"  # relative: the folder may be moved
    assert callback.newest == folder / "000000108.ckpt"
    assert not find_damage(folder / "last.ckpt")
    stored = {k.removeprefix("model.net."): v for k, v in load(folder / "last.ckpt")["state_dict"].items()}
    assert same(stored, weights(module))
    assert not list(folder.glob("*.part"))


def test_a_resumed_run_removes_the_checkpoints_that_were_ahead_of_it(tmp_path):
    folder = tmp_path / "checkpoints"
    fit(digits_module(), tmp_path, 5, Checkpoint(12, keep=3))
    assert names(folder)[:-1] == ["000000036.ckpt", "000000048.ckpt", "000000060.ckpt"]
    fit(digits_module(), tmp_path, 4, Checkpoint(48, keep=3), resume=folder / "000000036.ckpt")
    assert names(folder) == ["000000036.ckpt", "000000048.ckpt", "last.ckpt"]
    assert (folder / "last.ckpt").resolve().name == "000000048.ckpt"


def test_checkpoints_are_ordered_by_number_beyond_a_billion_images(tmp_path):
    module = digits_module()
    module.images_seen = 999_999_976
    fit(module, tmp_path, 4, Checkpoint(12, keep=2))
    assert names(tmp_path / "checkpoints") == ["1000000012.ckpt", "1000000024.ckpt", "last.ckpt"]


def test_a_save_that_fails_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"

    def fill_the_disk(trainer):
        monkeypatch.setattr(torch, "save", full)

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write checkpoint 000000036\.ckpt"):
        fit(digits_module(), tmp_path, 5, At(36, fill_the_disk), Checkpoint(12, keep=2))
    assert names(folder) == ["000000012.ckpt", "000000024.ckpt", "last.ckpt"]
    assert not any(find_damage(folder / name) for name in names(folder))


def test_keep_is_at_least_one():
    with pytest.raises(ValueError, match=r"checkpoint\.keep must be at least 1, got 0"):
        Checkpoint(keep=0)


# The log


class Outputs(pl.Callback):
    """Keeps the losses and times of every micro-batch."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.times: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.losses.append(outputs["losses"])
        self.times.append(outputs["times"])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_losses_in_total_and_per_time_bin_are_means_over_all_samples(accumulate, tmp_path):
    logger, outputs = Memory(), Outputs()
    settings = {"logger": logger, "log_every_n_steps": 3, "accumulate_grad_batches": accumulate}
    fit(digits_module(), tmp_path, 7, outputs, TrainingLog(bins=4), **settings)
    losses, times = torch.cat(outputs.losses), torch.cat(outputs.times)
    assert [(row["step"], row["images_seen"]) for row in logger.rows] == [(3, 36), (6, 72), (7, 84)]
    for row, start, end in zip(logger.rows, (0, 36, 72), (36, 72, 84), strict=True):
        part, bins = losses[start:end], (4 * times[start:end]).long()
        assert row["loss"] == pytest.approx(part.mean().item(), rel=1e-5)
        total = 0.0
        for i, label in enumerate(("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")):
            inside = part[bins == i]
            if len(inside):
                assert row[f"loss_t/{label}"] == pytest.approx(inside.mean().item(), rel=1e-5)
                total += row[f"loss_t/{label}"] * len(inside)
            else:
                assert f"loss_t/{label}" not in row
        assert total / len(part) == pytest.approx(row["loss"], rel=1e-5)
        assert row["learning_rate"] == 1e-3


def test_images_seen_is_exact_beyond_the_integers_of_float32(tmp_path):
    logger, module = Memory(), digits_module()
    module.images_seen = 2**24 + 1
    fit(module, tmp_path, 1, TrainingLog(), logger=logger, log_every_n_steps=1)
    assert [row["images_seen"] for row in logger.rows] == [2**24 + 13]


def test_the_pace_leaves_out_what_sampling_took(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    for module in ("hooks", "callbacks.training_log"):
        monkeypatch.setattr(f"fmlit.training.{module}.time", clock)

    class Tick(pl.Callback):
        def on_train_batch_start(self, *_):
            clock.now += 0.5

    class Long(Recorder):
        def act(self, *_):
            clock.now += 100

    logger, long = Memory(), Long(24)
    fit(digits_module(), tmp_path, 4, Tick(), long, TrainingLog(), logger=logger, log_every_n_steps=2)
    assert [row["images_per_second"] for row in logger.rows] == [24.0, 24.0]
    assert long.seconds == 200


def test_logging_can_be_left_to_the_end(tmp_path):
    logger = Memory()
    fit(digits_module(), tmp_path, 3, TrainingLog(), logger=logger, log_every_n_steps=0)
    assert [row["images_seen"] for row in logger.rows] == [36]


def test_progress_in_a_file_is_a_line_now_and_then(tmp_path, capsys):
    callbacks = TrainingLog(), ProgressBar(lines=3)
    fit(digits_module(), tmp_path, 9, *callbacks, enable_progress_bar=True, log_every_n_steps=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 3/9", "images 36"],
        ["step 6/9", "images 72"],
        ["step 9/9", "images 108"],
    ]
    assert all("loss " in line and "images/s " in line for line in lines)


@pytest.mark.parametrize(("make", "message"), [(TrainingLog, "bins must be .* got 0"), (ProgressBar, "lines .* got 0")])
def test_counts_are_at_least_one(make, message):
    with pytest.raises(ValueError, match=message):
        make(0)
