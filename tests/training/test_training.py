"""Whole training runs: that they learn, that they go on as if nothing had been, and that nothing disturbs them."""

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

import fmlit
from fmlit import Digits, Moons, TwoPoints
from fmlit.core.randomness import image_seeds
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CosinePath
from fmlit.flows.predictions import Score
from fmlit.models.mlp import MLP
from fmlit.sampling.samplers import ODESampler, SDESampler
from fmlit.storage.checkpoints import load
from fmlit.training.averages import EMA
from fmlit.training.callbacks import Checkpoint, QualityCurve, SampleGrid, TrainingLog
from fmlit.training.modules import FlowMatchingModule, GenerativeModule, ScoreMatchingModule
from fmlit.training.optimizers import AdamW
from fmlit.training.schedules import LearningRateSchedule
from tests.helpers.small_runs import Memory, digits_module, fit, same, tiny_unet, weights

FEW_STEPS = ODESampler("euler", 4)
with_dropout = partial(tiny_unet, dropout=0.5)


class State(pl.Callback):
    """The weights before each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.weights.append(weights(pl_module))


def everything(folder: Path, **arguments) -> list[pl.Callback]:
    """All that acts while training."""
    curve = QualityCurve(36, 80, metrics=("fid",), sampler=FEW_STEPS, batch_size=40, cache=str(folder / "cache"))
    stochastic = SampleGrid(24, SDESampler(steps=4), columns=2)
    return [EMA([100, 40]), stochastic, curve, Checkpoint(24, **arguments), TrainingLog()]


def assert_same_end(a: tuple[pl.Trainer, GenerativeModule], b: tuple[pl.Trainer, GenerativeModule]) -> None:
    """Weights, averages, optimizer, learning rate and clock agree in every bit."""
    (trainer, module), (other_trainer, other) = a, b
    assert same(weights(module), weights(other))
    optimizers = [t.optimizers[0].state_dict() for t in (trainer, other_trainer)]
    torch.testing.assert_close(*optimizers, rtol=0, atol=0)
    assert module.images_seen == other.images_seen
    assert trainer.global_step == other_trainer.global_step
    averages = [[c.averaged_weights() for c in t.callbacks if isinstance(c, EMA)] for t in (trainer, other_trainer)]
    for ours, theirs in zip(*averages, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(same(ours[name], theirs[name]) for name in ours)


def test_the_loss_falls_on_the_digits(tmp_path):
    logger, module = (
        Memory(),
        digits_module(net=tiny_unet, optimizer=AdamW(3e-3), schedule=LearningRateSchedule(warmup_images=640)),
    )
    sampler, cache = ODESampler("heun", 6), str(tmp_path / "cache")
    curve = QualityCurve(64 * 50, 200, metrics=("fid",), sampler=sampler, batch_size=100, cache=cache)
    fit(module, tmp_path, 100, EMA([2000]), curve, TrainingLog(), logger=logger, data=Digits(64), log_every_n_steps=20)
    losses = [row["loss"] for row in logger.rows if "loss" in row]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 1.0  # about the variance of the target, 1.4, at first
    assert losses[-1] < 0.7
    distances = [row["fd_pixels_200"] for row in logger.rows if "fd_pixels_200" in row]
    assert distances[1] < 0.8 * distances[0] < 8


def test_a_score_network_learns_the_score(tmp_path):
    """Of two points, whose exact score is known: |beta (s - s*)|^2 against |beta s*|^2."""
    net = partial(MLP, width=64, depth=2)
    arguments = {"shape": (1,), "num_classes": None, "conditional": False, "optimizer": AdamW(3e-3)}
    module = digits_module(ScoreMatchingModule, net, prediction=Score(), path=CosinePath(), **arguments)
    ema = EMA([5000], ramp=0.2)
    fit(module, tmp_path, 300, ema, data=TwoPoints(batch_size=128))
    model, exact, g = ema.model(module), GaussianMixture([[-2.0], [2.0]], 0.0), torch.Generator().manual_seed(1)
    t = 0.001 + 0.998 * torch.rand(2000, generator=g)
    x = model.path.sample(exact.sample(2000, g), torch.randn(2000, 1, generator=g), t)
    beta, truth = model.path.beta(t)[:, None], exact.score(x, model.path, t)
    with torch.no_grad():
        error = (beta * (model.score(x, t) - truth)).square().mean()
    assert error < 0.15 * (beta * truth).square().mean()
    for sampler in (ODESampler(), SDESampler(steps=60)):
        samples = sampler.sample(model, image_seeds(0, range(200))).flatten()
        assert ((samples.abs() - 2).abs() < 0.3).float().mean() > 0.85
        assert 0.35 < (samples > 0).float().mean() < 0.65


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_in_every_bit(accumulate, tmp_path):
    """With dropout, warm-up and decay; interrupted at a checkpoint of the callback's and at the end of a short run."""

    def module() -> GenerativeModule:
        return digits_module(net=with_dropout, schedule=LearningRateSchedule(144, warmup_images=60, decay="cosine"))

    def run(folder: Path, steps: int, resume: Path | None = None) -> tuple[pl.Trainer, GenerativeModule]:
        trained = module()
        callbacks = everything(tmp_path, keep=9)
        return fit(trained, folder, steps, *callbacks, resume=resume, accumulate_grad_batches=accumulate), trained

    whole = run(tmp_path / "whole", 12)
    checkpoints = tmp_path / "whole" / "checkpoints"
    assert_same_end(run(tmp_path / "resumed", 12, checkpoints / "000000072.ckpt"), whole)
    run(tmp_path / "short", 5)
    assert_same_end(run(tmp_path / "long", 12, tmp_path / "short" / "checkpoints" / "last.ckpt"), whole)


@pytest.mark.parametrize("asked_at", [28, 32, 36])
def test_an_early_end_waits_for_the_step_that_is_being_accumulated(asked_at, tmp_path):
    """Steps of 12 images in batches of 4. What was summed of an unfinished step would be seen, and lost."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            trainer.should_stop |= pl_module.images_seen == asked_at

    def run(steps: int, *callbacks: pl.Callback, resume: Path | None = None) -> tuple[pl.Trainer, GenerativeModule]:
        module = digits_module()
        return fit(module, tmp_path, steps, *callbacks, resume=resume, accumulate_grad_batches=3), module

    trainer, module = run(9, Stop())
    assert (trainer.global_step, module.images_seen) == (3, 36)
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    assert_same_end(run(6, resume=tmp_path / "early.ckpt"), run(6))


def test_a_run_is_resumed_in_the_middle_of_an_epoch_and_over_its_end(tmp_path):
    """35 points in batches of 12: a batch that spans two epochs is where a sampler would lose its place."""

    def run(steps: int, resume: Path | None = None) -> tuple[pl.Trainer, GenerativeModule]:
        module = digits_module(shape=(2,), num_classes=None, conditional=False)
        return fit(module, tmp_path, steps, EMA([50]), data=Moons(35, 12), resume=resume), module

    whole = run(9)
    for steps in (2, 3, 7):
        run(steps)[0].save_checkpoint(tmp_path / "a.ckpt")
        assert_same_end(run(9, tmp_path / "a.ckpt"), whole)


@pytest.mark.parametrize("averaged", [True, False])
def test_nothing_that_acts_changes_the_trajectory(averaged, tmp_path):
    """With dropout: samples of the trained weights themselves would show it, and callbacks that draw random numbers."""
    plain, watched = digits_module(net=with_dropout), digits_module(net=with_dropout)
    alone, disturbed = State(), State()
    trainers = [
        fit(plain, tmp_path / "plain", 8, alone),
        fit(watched, tmp_path / "watched", 8, *everything(tmp_path)[not averaged :], disturbed),
    ]
    assert len(alone.weights) == len(disturbed.weights) == 8
    assert all(same(a, b) for a, b in zip(alone.weights, disturbed.weights, strict=True))
    assert same(weights(plain), weights(watched))
    torch.testing.assert_close(*[t.optimizers[0].state_dict() for t in trainers], rtol=0, atol=0)
    assert [m.training for m in plain.modules()] == [m.training for m in watched.modules()]


def test_a_checkpoint_becomes_the_model_that_was_trained(tmp_path):
    module, ema = digits_module(net=with_dropout), EMA([100, 40])
    fit(module, tmp_path, 6, ema, Checkpoint(36))
    path, seeds, labels = tmp_path / "checkpoints" / "last.ckpt", image_seeds(3, range(4)), torch.arange(4)
    for name, model in {"ema": ema.model(module), "ema_40": ema.model(module, "ema_40"), "raw": module.model}.items():
        loaded = fmlit.load(path, name)
        assert torch.equal(FEW_STEPS.sample(loaded, seeds, labels), FEW_STEPS.sample(model, seeds, labels))
    assert load(path)["images_seen"] == 72


class Norms(pl.Callback):
    """The norm of all gradients before clipping, of those that the optimizer saw, and what is left after the step."""

    def __init__(self) -> None:
        self.before: list[float] = []
        self.used: list[float] = []
        self.left: list[Tensor] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(self.norm(pl_module))

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.left += [p.grad for p in pl_module.parameters() if p.grad is not None]

    def watch(self, module, monkeypatch):
        forget = torch.optim.AdamW.zero_grad

        def zero_grad(optimizer):
            self.used.append(self.norm(module))
            forget(optimizer)

        monkeypatch.setattr(torch.optim.AdamW, "zero_grad", zero_grad)

    def norm(self, module: GenerativeModule) -> float:
        return torch.stack([p.grad.norm() for p in module.parameters()]).norm().item()


def test_gradients_are_clipped_and_weights_stay_float32_in_mixed_precision(tmp_path, monkeypatch):
    module, norms, seen = digits_module(), Norms(), []
    norms.watch(module, monkeypatch)
    module.model.net.outputs[1].register_forward_hook(lambda net, inputs, output: seen.append(output.dtype))
    settings = {"precision": "bf16-mixed", "gradient_clip_val": 0.1}
    fit(module, tmp_path, 3, EMA(), norms, SampleGrid(12, FEW_STEPS), **settings)
    # The average, whose copy holds the hook too, samples: four batches of four steps.
    assert seen == ([torch.bfloat16] + [torch.float32] * 16) * 3
    assert min(norms.before) > 0.2
    assert norms.used == pytest.approx([0.1] * 3, rel=1e-4)
    assert norms.left == []
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_a_checkpoint_that_was_copied_as_a_file_is_not_replaced_by_a_link_to_itself(tmp_path):
    fit(digits_module(), tmp_path / "there", 2, Checkpoint(12))
    last = tmp_path / "here" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes((tmp_path / "there" / "checkpoints" / "last.ckpt").read_bytes())
    whole = last.read_bytes()
    fit(digits_module(), tmp_path / "here", 3, Checkpoint(10**9), resume=last, limit_train_batches=0)
    assert last.read_bytes() == whole


def test_an_optimiser_of_the_users_own_is_resumed_as_it_was(tmp_path):
    class Layerwise(FlowMatchingModule):
        def configure_optimizers(self):
            *rest, last = self.model.net.parameters()
            groups = [{"params": rest, "lr": 1e-3, "weight_decay": 0.1}, {"params": [last], "lr": 1e-5}]
            return torch.optim.AdamW(groups, weight_decay=0.0)

    def rates(trainer: pl.Trainer) -> list[tuple[float, float]]:
        return [(group["lr"], group["weight_decay"]) for group in trainer.optimizers[0].param_groups]

    path = tmp_path / "a.ckpt"
    fit(digits_module(Layerwise), tmp_path, 2).save_checkpoint(path)
    assert rates(fit(digits_module(Layerwise), tmp_path, 4, resume=path)) == [(1e-3, 0.1), (1e-5, 0.0)]
