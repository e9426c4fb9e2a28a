"""Training on several processes is training on one, shared out: gloo on the CPU, processes as torchrun starts them."""

import functools
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fmlit.flows.couplings import IndependentCoupling, OptimalTransportCoupling
from fmlit.sampling.samplers import ODESampler
from fmlit.training.averages import EMA
from fmlit.training.callbacks import Checkpoint, QualityCurve, SampleGrid, TrainingLog
from tests.helpers.small_runs import Memory, digits_module, fit, names, same, tiny_unet, weights

# Imported once, in the server from which all processes fork, and not again in each.
multiprocessing.set_forkserver_preload(
    [
        "fmlit.training.callbacks",
        "diffusers.models.unets.unet_2d",
        "sklearn.datasets",
        "sklearn.model_selection",
        "torchvision",
    ]
)

STEPS = 20


class Counting(ODESampler):
    """Knows which seeds it was given."""

    drawn: tuple[int, ...] = ()

    def sample(self, model, seeds, labels=None, trajectory=False, guide=None):
        self.drawn += tuple(seeds.tolist())
        return super().sample(model, seeds, labels, trajectory, guide)


class Report(pl.Callback):
    """Every rank writes down what it ends with, and rank 0 what was logged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        callbacks = {type(callback): callback for callback in trainer.callbacks}
        logged = trainer.logger.rows if trainer.is_global_zero else []
        pace = "images_per_second"
        report = {
            "weights": weights(pl_module),
            "ema": callbacks[EMA].averaged_weights(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "images_seen": pl_module.images_seen,
            "world_size": dist.get_world_size() if dist.is_initialized() else 1,
            "logged": [{key: value for key, value in row.items() if key != pace} for row in logged],
            "quality": callbacks[QualityCurve].latest,
            "drawn": sorted(callbacks[SampleGrid].sampler.drawn),
        }
        torch.save(report, self.folder / f"report-{trainer.global_rank}.pt")


def run(
    folder: Path, steps: int = STEPS, dropout: float = 0.0, transport: bool = False, fast: bool = False, **settings: Any
) -> None:
    """Train on the digits with everything that acts on the way."""
    recipe = {"muon": True, "learned_loss_weight": True, "channels_last": True} if fast else {}
    coupling = OptimalTransportCoupling(12, across_ranks=True) if transport else IndependentCoupling()
    module = digits_module(net=functools.partial(tiny_unet, dropout=dropout), coupling=coupling, **recipe)
    few = ODESampler("euler", 4)
    curve = QualityCurve(120, 70, metrics=("fid",), sampler=few, batch_size=16, cache=f"{folder}/cache")
    callbacks = (
        EMA([100]),
        SampleGrid(120, Counting("euler", 4), columns=2),
        curve,
        Checkpoint(60, keep=9),
        TrainingLog(),
        Report(folder),
    )
    fit(module, folder, steps, *callbacks, logger=Memory(), log_every_n_steps=5, **settings)


def worker(rank: int, ranks: int, port: int, folder: Path, settings: dict[str, Any]) -> None:
    """What torchrun starts."""
    torch.set_num_threads(1)
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({key: str(value) for key, value in {**local, **meeting}.items()})
    run(folder, devices=ranks, strategy="ddp", **settings)
    dist.destroy_process_group()


def train(folder: Path, ranks: int, **settings: Any) -> list[dict[str, Any]]:
    """The reports of all ranks of a run; one rank trains here, without torch.distributed."""
    folder.mkdir(parents=True, exist_ok=True)
    if ranks == 1:
        run(folder, **settings)
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.start_processes(worker, (ranks, port, folder, settings), ranks, start_method="forkserver")
    return [torch.load(folder / f"report-{rank}.pt", weights_only=True) for rank in range(ranks)]


def assert_close(a: Any, b: Any, atol: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"), 1)[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_train_what_one_trains(ranks, alone, tmp_path):
    reports = train(tmp_path, ranks)
    for report in reports:
        assert report["world_size"] == ranks
        assert report["images_seen"] == alone["images_seen"] == 240
        assert_close(report["weights"], alone["weights"], 1e-5)
        assert_close(report["ema"], alone["ema"], 1e-5)
        assert same(report["weights"], reports[0]["weights"])
        assert same(report["ema"]["ema_100"], reports[0]["ema"]["ema_100"])
        assert report["quality"] == reports[0]["quality"]  # all ranks know the score
    assert len(reports[0]["logged"]) == len(alone["logged"]) == 6
    for row, expected in zip(reports[0]["logged"], alone["logged"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    assert names(tmp_path / "samples", "*") == ["000000120.png", "000000240.png"]
    drawn = sorted(seed for report in reports for seed in report["drawn"])
    assert drawn == alone["drawn"]  # each image by one of the ranks
    assert min(len(report["drawn"]) for report in reports) > 0
    numbered = [f"{images:09d}.ckpt" for images in (60, 120, 180, 240)]
    assert names(tmp_path / "checkpoints") == [*numbered, "best.ckpt", "last.ckpt"]


def test_a_fast_recipe_too(tmp_path):
    """Muon orthogonalises the gradient of the global batch, and the weight of the loss over t is learned from it."""
    (alone,) = train(tmp_path / "1", 1, fast=True)
    for report in train(tmp_path / "2", 2, fast=True):
        assert_close(report["weights"], alone["weights"], 5e-5)
        assert_close(report["ema"], alone["ema"], 5e-5)


def test_accumulation_is_the_same_on_one_rank_and_on_two(tmp_path):
    (alone,) = train(tmp_path / "1", 1, accumulate_grad_batches=2)
    for report in train(tmp_path / "2", 2, accumulate_grad_batches=2):
        assert report["images_seen"] == 240
        assert_close(report["weights"], alone["weights"], 5e-5)  # rounding; noise that repeats would differ by 1e-2
        assert_close(report["ema"], alone["ema"], 5e-5)


def test_groups_of_a_coupling_span_ranks(tmp_path):
    (alone,) = train(tmp_path / "1", 1, transport=True)
    for report in train(tmp_path / "2", 2, transport=True):
        assert_close(report["weights"], alone["weights"], 5e-5)  # rounding; other pairs would differ by 1e-2
        logged = report["logged"] or alone["logged"]
    for row, expected in zip(logged, alone["logged"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    costs = [(row["transport_cost"], row["transport_cost_independent"]) for row in logged if "loss" in row]
    assert len(costs) == 4
    assert all(0 < coupled < independent for coupled, independent in costs)


def test_a_resumed_run_is_the_uninterrupted_one_in_every_bit(tmp_path):
    """With dropout and accumulation, whose masks and micro-batches no checkpoint holds."""
    settings = {"dropout": 0.5, "accumulate_grad_batches": 2}
    whole = train(tmp_path / "whole", 2, **settings)
    checkpoint = tmp_path / "whole" / "checkpoints" / "000000120.ckpt"
    resumed = train(tmp_path / "resumed", 2, resume=checkpoint, **settings)
    for a, b in zip(whole, resumed, strict=True):
        assert same(a["weights"], b["weights"])
        assert same(a["ema"]["ema_100"], b["ema"]["ema_100"])
        assert_close(a["optimizer"], b["optimizer"], 0)
        assert a["images_seen"] == b["images_seen"] == 240
        assert a["quality"] == b["quality"]
    assert resumed[0]["logged"] == [row for row in whole[0]["logged"] if row["images_seen"] > 120]
