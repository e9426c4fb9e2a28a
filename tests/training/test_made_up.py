"""What an interruption has cut short is made up for by the run that is resumed."""

import os
from pathlib import Path

import pytest
import torch

from fmlit.core.errors import FileError
from fmlit.sampling.samplers import ODESampler
from fmlit.storage.checkpoints import load, newest_valid
from fmlit.training.callbacks import Checkpoint, QualityCurve, SampleGrid
from fmlit.training.callbacks.checkpoint import link
from fmlit.training.loggers import MetricsFile, read_rows
from tests.helpers.small_runs import digits_module, fit, names

FEW_STEPS = ODESampler("euler", 4)


class Killed(Exception):
    pass


def run(folder: Path, steps: int, killed_in: type | None = None, killed_at: int = 0) -> dict[str, list]:
    """A run of 12 images per step that samples, scores and saves every 24; what it leaves."""
    resume = newest_valid(folder / "checkpoints") if (folder / "checkpoints").exists() else None
    grid = SampleGrid(24, FEW_STEPS, columns=1)
    curve = QualityCurve(24, 40, metrics=("fid",), sampler=FEW_STEPS, batch_size=20, cache=str(folder.parent / "cache"))
    logger = MetricsFile(folder, load(resume)["global_step"] if resume else 0)
    with pytest.MonkeyPatch.context() as patch:
        if killed_in is not None:

            def die(self, trainer, module, act=killed_in.act):
                if trainer.global_step == killed_at:
                    raise Killed
                act(self, trainer, module)

            patch.setattr(killed_in, "act", die)
        callbacks = Checkpoint(24, keep=10), grid, curve
        try:
            fit(digits_module(), folder, steps, *callbacks, resume=resume, logger=logger)
        except Killed:
            assert killed_in is not None
    scores = {row["step"]: row["fd_pixels_40"] for row in read_rows(folder / "metrics.csv") if row.get("fd_pixels_40")}
    best = folder / "checkpoints" / "best.ckpt"
    return {
        "pictures": [(folder / "samples" / name).read_bytes() for name in names(folder / "samples", "*.png")],
        "scores": list(scores.items()),
        "rows": [row["step"] for row in read_rows(folder / "metrics.csv")],
        "best": [load(best)["images_seen"]] if best.exists() else [],
    }


@pytest.mark.parametrize("killed_in", [SampleGrid, QualityCurve])
@pytest.mark.parametrize("killed_at", [2, 4])
def test_pictures_and_scores_are_made_up_in_the_course_of_a_run_and_at_its_end(tmp_path, killed_in, killed_at):
    whole = run(tmp_path / "whole", 4)
    assert len(whole["pictures"]) == len(whole["scores"]) == 2
    interrupted = tmp_path / "interrupted"
    cut = run(interrupted, 4, killed_in, killed_at)
    assert cut != whole
    assert run(interrupted, 4) == whole
    assert run(interrupted, 4) == whole  # nothing is due any more


def test_a_best_checkpoint_whose_save_was_cut_short_is_made_up(tmp_path):
    whole = run(tmp_path / "whole", 2)
    cut = tmp_path / "cut"
    run(cut, 2)
    (cut / "checkpoints" / "best.ckpt").unlink()
    (cut / "checkpoints" / "best.ckpt.sha256").unlink()
    assert run(cut, 2) == whole


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch):
    run(tmp_path, 2)
    calls = []
    for callback in (SampleGrid, QualityCurve, Checkpoint):
        monkeypatch.setattr(callback, "act", lambda self, trainer, module: calls.append(type(self).__name__))
    run(tmp_path, 2)
    assert not calls


def test_a_run_whose_last_checkpoint_finds_no_room_has_not_ended_well(tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FileError, match=r"cannot write checkpoint 000000036\.ckpt"):
        fit(digits_module(), tmp_path, 3, Checkpoint(12, on_error="continue"))


def test_damaged_rows_of_metrics_are_dropped_with_a_warning(tmp_path, caplog):
    metrics = MetricsFile(tmp_path)
    for step in (1, 2):
        metrics.log_metrics({"images_seen": 10 * step, "loss": 1.0}, step=step)
    with (tmp_path / "metrics.csv").open("ab") as file:
        file.write(b"\0" * 200_000 + b"\n" + b"x" * 200_000 + b"\n3,30,0.5\n4,4")
    resumed = MetricsFile(tmp_path, resumed_at=3)
    resumed.log_metrics({"images_seen": 40, "loss": 0.25}, step=4)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")] == ["1", "2", "3", "4"]
    assert [message for message in caplog.messages if "dropped 2 damaged rows" in message]


def test_what_is_logged_later_at_the_step_of_a_resume_completes_its_row(tmp_path):
    MetricsFile(tmp_path).log_metrics({"images_seen": 10, "loss": 1.0}, step=1)
    resumed = MetricsFile(tmp_path, resumed_at=1)
    resumed.log_metrics({"images_seen": 10, "fid_5k": 7.5}, step=1)
    (row,) = read_rows(tmp_path / "metrics.csv")
    assert row == {"step": "1", "images_seen": "10", "loss": "1.0", "fid_5k": "7.5"}


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_system_without_symbolic_links_has_a_last_checkpoint(tmp_path, monkeypatch, hard_links):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "000000012.ckpt").write_bytes(b"a checkpoint")
    (tmp_path / "last.ckpt").write_bytes(b"an older one")
    link(tmp_path / "last.ckpt", tmp_path / "000000012.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == b"a checkpoint"
    assert (tmp_path / "last.ckpt").stat().st_nlink == (2 if hard_links else 1)
    assert names(tmp_path, "*") == ["000000012.ckpt", "last.ckpt"]


def test_callbacks_that_are_used_for_a_second_run_know_nothing_of_the_first(tmp_path):
    """As in a notebook, where the cell that trains is run once more."""
    grid, checkpoint = SampleGrid(24, FEW_STEPS, columns=1), Checkpoint(24, keep=1, milestones=[12])
    curve = QualityCurve(24, 40, metrics=("fid",), sampler=FEW_STEPS, batch_size=20, cache=str(tmp_path / "cache"))
    for folder in ("first", "second"):
        fit(digits_module(), tmp_path / folder, 4, checkpoint, grid, curve)
    first, second = (
        sorted(p.relative_to(tmp_path / f) for p in (tmp_path / f).rglob("*")) for f in ("first", "second")
    )
    assert first == second
    assert {"000000024.png", "000000048.png", "best.ckpt"} <= {path.name for path in first}
