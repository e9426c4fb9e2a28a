"""Optimizers that a recipe names: what they build, and how their settings survive a resume."""

from dataclasses import dataclass

import pytest
import torch

import fmlit
from fmlit.core.errors import UserError
from fmlit.training.muon import MuonAdamW
from fmlit.training.optimizers import AdamW, Muon, OptimizerConfig, TorchOptimizer
from tests.helpers.small_convnet import ConvNet
from tests.helpers.small_runs import digits_module, fit, same, weights


@dataclass(frozen=True)
class HandWritten(OptimizerConfig):
    """An optimizer of the user's own."""

    learning_rate: float = 0.1

    def build(self, net, others=(), fused=False):
        return torch.optim.SGD([*net.parameters(), *others], lr=self.learning_rate, momentum=0.9)


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_trains_the_network_and_then_the_other_parameters(fused):
    net, other = ConvNet(), torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW(3e-4, (0.8, 0.95), 0.02).build(net, [other], fused)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert [id(p) for p in group["params"]] == [id(p) for p in (*net.parameters(), other)]
    assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (3e-4, (0.8, 0.95), 0.02, fused)


def test_muon_passes_every_setting_on():
    other = torch.nn.Parameter(torch.ones(2))
    optimizer = Muon(3e-4, (0.8, 0.95), 0.02, momentum=0.9, nesterov=False, ns_steps=3).build(ConvNet(), [other], True)
    rest, muon = optimizer.param_groups
    assert type(optimizer) is MuonAdamW
    assert rest["params"][-1] is other
    assert (rest["lr"], rest["betas"], rest["weight_decay"], rest["fused"]) == (3e-4, (0.8, 0.95), 0.02, True)
    assert (muon["lr"], muon["weight_decay"], muon["momentum"], muon["nesterov"]) == (3e-4, 0.02, 0.9, False)
    assert muon["ns_steps"] == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(0.0), "learning_rate must be positive, got 0.0"),
        (lambda: AdamW(float("nan")), "learning_rate must be positive, got nan"),
        (lambda: TorchOptimizer("SGD", -1.0), "learning_rate must be positive, got -1.0"),
        (lambda: AdamW(betas=(0.9, 1.0)), r"betas must lie in \[0, 1\), got \[0.9, 1.0\]"),
        (lambda: AdamW(weight_decay=-0.1), "weight_decay must not be negative, got -0.1"),
        (lambda: Muon(momentum=1.0), r"momentum must lie in \[0, 1\), got 1.0"),
        (lambda: Muon(ns_steps=0), "ns_steps must be at least 1, got 0"),
        (lambda: TorchOptimizer("Adm"), "torch.optim has no optimizer Adm; did you mean Adam?"),
        (lambda: TorchOptimizer("Optimizer"), "torch.optim has no optimizer Optimizer; choose from .*, SGD"),
        (lambda: TorchOptimizer("SGD", settings={"mass": 1}).build(ConvNet()), "torch.optim.SGD: .* argument 'mass'"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("config", [TorchOptimizer("SGD", 0.1, {"momentum": 0.9}), HandWritten()])
def test_any_other_optimizer_follows_the_schedule_and_is_resumed(config, tmp_path):
    def module():
        return digits_module(
            optimizer=config, schedule=fmlit.LearningRateSchedule(images=96, decay="linear"), learned_loss_weight=True
        )

    whole, half, resumed = module(), module(), module()
    before = weights(whole)
    trainer = fit(whole, tmp_path, 4)
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(
        0.1 * 0.5625
    )  # in the middle of images 36 to 48 of 96
    assert not same(before, weights(whole))
    fit(half, tmp_path, 2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path, 4, resume=tmp_path / "half.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())


def test_a_resumed_run_uses_every_setting_of_now(tmp_path):
    def module(optimizer):
        return digits_module(optimizer=optimizer, schedule=fmlit.LearningRateSchedule(images=96, decay="linear"))

    fit(module(Muon(1e-3)), tmp_path, 2).save_checkpoint(tmp_path / "a.ckpt")
    changed = Muon(1e-2, (0.5, 0.6), 0.1, momentum=0.8, nesterov=False, ns_steps=4)
    trainer = fit(module(changed), tmp_path, 4, resume=tmp_path / "a.ckpt")
    rest, muon = trainer.optimizers[0].param_groups
    assert (rest["peak_lr"], rest["betas"], rest["weight_decay"]) == (1e-2, (0.5, 0.6), 0.1)
    assert (muon["momentum"], muon["nesterov"], muon["ns_steps"], muon["weight_decay"]) == (0.8, False, 4, 0.1)
    assert rest["lr"] == muon["lr"] == pytest.approx(1e-2 * 0.5625)
    steps = {int(state["step"]) for state in trainer.optimizers[0].state.values() if "step" in state}
    assert steps == {4}


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    fit(digits_module(optimizer=Muon(1e-3)), tmp_path, 1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"model.optimizer: the checkpoint was trained by Muon, not AdamW"):
        fit(digits_module(), tmp_path, 2, resume=tmp_path / "a.ckpt")
