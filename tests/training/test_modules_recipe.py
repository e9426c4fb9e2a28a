"""What a fast recipe adds to training: Muon, a learned weight over time, a late decay, the channels-last format."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from fmlit.models.compilation import Execution
from fmlit.storage.exports import load, save
from fmlit.training.averages import EMA
from fmlit.training.callbacks import Checkpoint
from fmlit.training.muon import MuonAdamW, hidden_matrices
from fmlit.training.optimizers import AdamW, Muon
from fmlit.training.schedules import LearningRateSchedule
from tests.helpers.small_runs import digits_module, fit, same, tiny_unet, weights

MUON = Muon(1e-3, betas=(0.9, 0.95), weight_decay=0.01)
FAST = {"optimizer": MUON, "learned_loss_weight": True, "net": tiny_unet}


def test_the_rate_stays_before_it_decays():
    schedule = LearningRateSchedule(1500, warmup_images=100, stable_images=400, decay="linear")
    factors = [schedule.factor(n) for n in (50, 100, 300, 500, 1000, 1500, 2000)]
    assert factors == [0.5, 1, 1, 1, 0.5, 0, 0]


def test_muon_takes_the_matrices_and_adamw_the_rest():
    module = digits_module(**FAST | {"optimizer": replace(MUON, learning_rate=3e-4)})
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, MuonAdamW)
    adamw, muon = optimizer.param_groups
    assert set(muon["params"]) == set(hidden_matrices(module.model.net))
    trained = {parameter for parameter in module.parameters() if parameter.requires_grad}
    assert set(adamw["params"]) | set(muon["params"]) == trained
    assert set(module.loss_weight.output.parameters()) <= set(adamw["params"])
    assert (adamw["betas"], adamw["lr"], muon["lr"], muon["weight_decay"]) == ((0.9, 0.95), 3e-4, 3e-4, 0.01)


def test_a_run_that_was_interrupted_ends_with_the_same_weights(tmp_path):
    whole, first, second = (digits_module(**FAST) for _ in range(3))
    fit(whole, tmp_path / "whole", 4, EMA(), gradient_clip_val=1.0)
    fit(first, tmp_path / "part", 2, EMA(), Checkpoint(every=12), gradient_clip_val=1.0)
    checkpoint = tmp_path / "part" / "checkpoints" / "last.ckpt"
    fit(second, tmp_path / "part", 4, EMA(), resume=checkpoint, gradient_clip_val=1.0)
    assert same(whole.state_dict(), second.state_dict())
    assert not same(whole.state_dict(), first.state_dict())
    assert any(name.startswith("loss_weight.") for name in whole.state_dict())


def test_accumulated_batches_make_one_step(tmp_path):
    module = digits_module(**FAST)
    fit(module, tmp_path, 2, EMA(), accumulate_grad_batches=3)
    steps = {int(s["step"]) for s in module.trainer.optimizers[0].state.values() if "step" in s}
    assert steps == {2}
    assert module.images_seen == 24


@pytest.mark.parametrize("u", [0.0, 0.7])
def test_the_learned_loss_weight_weighs_the_loss_and_not_what_is_reported(u, tmp_path):
    plain, weighed = digits_module(), digits_module(learned_loss_weight=True)
    reported, optimized = [], []
    for module in (plain, weighed):
        fit(module, tmp_path, 1)  # which attaches a trainer
        module.model.net.load_state_dict(digits_module().model.net.state_dict())
        torch.nn.init.constant_(weighed.loss_weight.output.bias, u)
        torch.nn.init.zeros_(weighed.loss_weight.output.weight)
        module.images_seen = 0
        outputs = module.training_step({"data": torch.ones(6, 1, 8, 8), "labels": torch.arange(6)}, 0)
        reported.append(outputs["losses"])
        optimized.append(outputs["loss"].item())
    assert torch.equal(*reported)
    assert optimized[1] == pytest.approx(optimized[0] * math.exp(-u) + u)


def test_it_learns(tmp_path):
    """Muon and AdamW at one rate that is high for both: in 150 steps Muon's loss falls further."""

    def loss(optimizer, **options):
        module = digits_module(optimizer=optimizer, **options)
        losses, step = [], module.training_step

        def noted(*args):
            losses.append(step(*args))
            return losses[-1]

        module.training_step = noted
        fit(module, tmp_path, 150)
        return torch.cat([out["losses"] for out in losses[-50:]]).mean().item()

    adamw = loss(AdamW(1e-2))
    assert adamw < 1.2  # it starts at 2
    assert loss(Muon(1e-2)) < 0.98 * adamw
    assert loss(Muon(1e-2), learned_loss_weight=True) < 0.98 * adamw


def test_channels_last_trains_saves_and_exports(tmp_path):
    net = partial(tiny_unet, dropout=0.0)  # masks follow the order in memory
    plain, module = digits_module(net=net), digits_module(net=net, execution=Execution(channels_last=True))
    ema = EMA()
    fit(plain, tmp_path / "plain", 3)
    fit(module, tmp_path / "last", 3, ema, Checkpoint(every=12))
    kernel = module.model.net.unet.down_blocks[0].resnets[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert ema.model(module).net.unet.down_blocks[0].resnets[0].conv1.weight.stride() == kernel.stride()
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(module)[name], value, rtol=1e-3, atol=1e-4)
    (tmp_path / "export").mkdir()
    save(module.model, tmp_path / "export")
    assert same(load(tmp_path / "export").net.state_dict(), copy.deepcopy(module.model.net).state_dict())


def test_a_memory_format_that_is_new_at_a_resume(tmp_path):
    """The optimizer's state follows its parameters: fused kernels compare strides on GPUs."""
    net = partial(tiny_unet, dropout=0.0)
    formats = [Execution(channels_last=last) for last in (False, False, True)]
    whole, first, second = (digits_module(net=net, execution=execution) for execution in formats)
    fit(whole, tmp_path / "whole", 4, EMA())
    fit(first, tmp_path / "part", 2, EMA(), Checkpoint(every=12))
    trainer = fit(second, tmp_path / "part", 4, EMA(), resume=tmp_path / "part" / "checkpoints" / "last.ckpt")
    for parameter, state in trainer.optimizers[0].state.items():
        assert state["exp_avg"].stride() == parameter.stride()
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(second)[name], value, rtol=1e-3, atol=1e-4)
