"""Callbacks that sample: pictures and quality while training."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fmlit import Moons
from fmlit.core.randomness import image_seeds
from fmlit.flows.couplings import OptimalTransportCoupling
from fmlit.metrics import ImageQuality
from fmlit.sampling.samplers import ChurnSampler, ODESampler, SDESampler
from fmlit.storage.checkpoints import find_damage, load
from fmlit.training.averages import EMA
from fmlit.training.callbacks import Checkpoint, QualityCurve, SampleGrid
from fmlit.training.draws import TrainingDraws
from fmlit.training.optimizers import AdamW
from tests.helpers.small_runs import Memory, digits_module, fit, names

FEW_STEPS = ODESampler("euler", 4)


class Drawn(ODESampler):
    """Keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__("euler", 4)
        self.calls: list[tuple] = []

    def sample(self, model, seeds, labels=None, trajectory=False, guide=None):
        self.calls.append((model, seeds, labels))
        return super().sample(model, seeds, labels, trajectory, guide)


def test_grids_are_of_the_same_noise_from_the_average_with_a_class_per_row(tmp_path):
    sampler, ema, logger = Drawn(), EMA(), Memory()
    grid = SampleGrid(24, sampler, columns=3, seed=5)
    fit(digits_module(), tmp_path, 4, ema, grid, logger=logger)
    assert names(tmp_path / "samples", "*") == ["000000024.png", "000000048.png"]
    assert grid.newest == tmp_path / "samples" / "000000048.png"
    assert logger.pictures == [("samples", 2), ("samples", 4)]
    for first in (0, 4):  # a picture is drawn in four batches, the last one padded
        models, seeds, labels = zip(*sampler.calls[first : first + 4], strict=True)
        assert all(model.net is ema.copies["ema_500000"] for model in models)
        assert torch.equal(torch.cat(seeds)[:30], image_seeds(5, range(30)))
        assert torch.equal(torch.cat(labels)[:30], torch.arange(10).repeat_interleave(3))
    assert len(sampler.calls) == 8
    with Image.open(grid.newest) as picture:
        assert picture.size == (3 * 50 + 2, 10 * 50 + 2)  # 8 pixels sixfold, a border of 2


def test_grids_of_equal_weights_are_equal(tmp_path):
    fit(digits_module(optimizer=AdamW(1e-30)), tmp_path, 4, SampleGrid(24, FEW_STEPS))
    first, second = (path.read_bytes() for path in sorted((tmp_path / "samples").iterdir()))
    assert first == second


def test_unconditional_grids_are_square_and_vectors_are_plotted(tmp_path):
    sampler = Drawn()
    fit(digits_module(conditional=False), tmp_path / "digits", 1, SampleGrid(12, sampler, columns=3))
    module = digits_module(shape=(2,), num_classes=None, conditional=False)
    fit(module, tmp_path / "moons", 1, SampleGrid(12, sampler), data=Moons(samples=100, batch_size=12))
    assert [(len(seeds), labels) for _, seeds, labels in sampler.calls] == [(3, None)] * 3 + [(1024, None)] * 4
    assert names(tmp_path / "moons" / "samples", "*") == ["000000012.png"]


def test_columns_are_at_least_one():
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        SampleGrid(columns=0)


def curve(folder: Path, every: int | None = 12, **arguments: Any) -> QualityCurve:
    settings: dict[str, Any] = {"n": 80, "sampler": FEW_STEPS, "batch_size": 16, "cache": str(folder / "cache")}
    return QualityCurve(every, **settings | arguments)


def scripted(monkeypatch, values: Iterable[float], name: str = "fd_pixels_80") -> None:
    """Let the curve take these values."""
    it = iter(values)
    monkeypatch.setattr(ImageQuality, "compute", lambda self: {name: next(it)})


def test_quality_is_measured_at_fixed_seeds_and_logged_by_name(tmp_path, capsys):
    logger = Memory()
    metrics = ("fid", "kid", "precision", "recall")
    callback = curve(tmp_path, 24, metrics=metrics)
    fit(digits_module(optimizer=AdamW(1e-30)), tmp_path, 4, EMA(), callback, logger=logger)
    first, second = logger.rows
    scores = {f"{name}_pixels_80": first[f"{name}_pixels_80"] for name in ("fd", "kd", "precision", "recall")}
    assert first == {**scores, "images_seen": 24, "step": 2}
    assert second == {**scores, "images_seen": 48, "step": 4}  # equal weights, equal numbers
    assert callback.latest == scores
    assert scores["fd_pixels_80"] > 1  # an untrained network
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "fd_pixels_80 is" in line]  # once
    protocol, cost = said.split("; ", 1)
    assert protocol == "fd_pixels_80 is fdpixels80-train-uint8-ema-euler4"
    number = r"[\d.e+-]+"
    expected = (
        rf"{number} s per 1,000 images, of which features {number} s; distances {number} s; peak memory {number} GB"
    )
    assert re.fullmatch(expected, cost)


@pytest.mark.parametrize(
    ("name", "values"), [("fd_pixels_80", [5.0, 3.0, 4.0, 3.5]), ("recall_pixels_80", [0.1, 0.6, 0.3, 0.2])]
)
def test_the_best_checkpoint_is_kept(name, values, tmp_path, monkeypatch):
    scripted(monkeypatch, values, name)
    fit(digits_module(), tmp_path, 4, EMA(), curve(tmp_path), Checkpoint(12, keep=1))
    assert names(tmp_path / "checkpoints") == ["000000048.ckpt", "best.ckpt", "last.ckpt"]
    best = load(tmp_path / "checkpoints" / "best.ckpt")
    assert best["images_seen"] == 24
    assert not find_damage(tmp_path / "checkpoints" / "best.ckpt")


def test_a_resumed_run_knows_the_best_value_so_far(tmp_path, monkeypatch):
    scripted(monkeypatch, [5.0, 3.0, 4.0])
    fit(digits_module(), tmp_path, 3, curve(tmp_path), Checkpoint(12))
    scripted(monkeypatch, [4.0, 2.0])
    resumed = curve(tmp_path)
    fit(digits_module(), tmp_path, 4, resumed, resume=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed.best == 3.0
    assert load(tmp_path / "checkpoints" / "best.ckpt")["images_seen"] == 24
    fit(digits_module(), tmp_path, 5, curve(tmp_path, 60), resume=tmp_path / "checkpoints" / "last.ckpt")
    assert load(tmp_path / "checkpoints" / "best.ckpt")["images_seen"] == 60


def test_the_best_value_is_known_though_the_checkpoint_is_from_before_its_score(tmp_path, monkeypatch):
    scripted(monkeypatch, [5.0, 3.0])
    fit(digits_module(), tmp_path, 2, Checkpoint(12), curve(tmp_path))
    scripted(monkeypatch, [4.0])
    resumed = curve(tmp_path)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert [v["best"] for k, v in load(last)["callbacks"].items() if k == resumed.state_key] == [5.0]
    fit(digits_module(), tmp_path, 3, Checkpoint(12), resumed, resume=last)
    assert resumed.best == 3.0
    assert load(tmp_path / "checkpoints" / "best.ckpt")["images_seen"] == 24


@pytest.mark.parametrize("sampler", [SDESampler(steps=2), ChurnSampler(2)])
def test_a_score_that_the_coupling_spoils_is_refused_before_training(sampler, tmp_path):
    module = digits_module(draws=TrainingDraws(coupling=OptimalTransportCoupling(4)))
    said = f"{type(sampler).__name__} needs the score, which does not follow from the velocity of a model that was"
    with pytest.raises(ValueError, match=f"samples.sampler: {said}"):
        fit(module, tmp_path, 1, SampleGrid(12, sampler))
    with pytest.raises(ValueError, match=f"quality.sampler: {said}"):
        fit(module, tmp_path, 1, curve(tmp_path, sampler=sampler))
    fit(module, tmp_path, 1, SampleGrid(12, FEW_STEPS), curve(tmp_path, None, sampler=sampler))


def test_vectors_have_no_quality_curve(tmp_path):
    module = digits_module(shape=(2,), num_classes=None, conditional=False)
    with pytest.raises(ValueError, match=r"quality.every: these distances need images, and the data are vectors"):
        fit(module, tmp_path, 1, curve(tmp_path), data=Moons(samples=100, batch_size=12))


def test_a_curve_that_is_off_computes_no_statistics(tmp_path):
    fit(digits_module(), tmp_path, 2, curve(tmp_path, None))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("arguments", "message"), [({"n": 1}, "got 1 and 16"), ({"batch_size": 0}, "got 80 and 0")])
def test_sample_sizes_that_make_no_sense_are_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        curve(tmp_path, **arguments)
