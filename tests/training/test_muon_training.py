"""``MuonAdamW`` in a run: skipped steps, saved states, schedules, Lightning."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from fmlit.training.muon import MuonAdamW
from tests.helpers.small_convnet import ConvNet, assert_same, backward, train


@pytest.mark.parametrize("before", [0, 2])
def test_where_found_inf_is_set_nothing_moves(before):
    net, other = ConvNet(), ConvNet()
    optimizer, expected = MuonAdamW(net, 0.1, weight_decay=0.1, fused=True), MuonAdamW(other, 0.1, weight_decay=0.1)
    train(net, optimizer, range(before))
    train(other, expected, range(before))
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))

    def closure():
        backward(net, before)
        for parameter in net.parameters():
            parameter.grad.flatten()[0] = torch.nan
        optimizer.found_inf = torch.tensor(1.0)  # only now, as what looks at gradients would
        return 7.0

    assert optimizer.step(closure) == 7.0
    after = (net.state_dict(), optimizer.state_dict()["state"])
    if before:
        assert_same(after, saved)
    assert_same(after[0], saved[0])
    assert {float(state["step"]) for state in after[1].values() if "step" in state} == {float(before)}
    optimizer.found_inf = torch.tensor(0.0)
    train(net, optimizer, range(before, before + 2))
    train(other, expected, range(before, before + 2))
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)  # the other is not fused


def test_no_step_waits_for_the_device():
    """Tensors without storage refuse to be read: every ``item``, ``if`` or copy to the host would raise."""
    net = nn.Sequential(nn.Conv2d(20, 16, 3, bias=False), nn.Linear(16, 40, bias=False)).to("meta")
    optimizer = MuonAdamW(net, 0.1, weight_decay=0.1, fused=True)
    for parameter in net.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.found_inf = torch.zeros((), device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.found_inf.item()
    optimizer.step()
    assert all(optimizer.state[p]["momentum_buffer"].is_meta for p in net.parameters())


def test_without_the_fused_kernel_found_inf_is_refused_before_anything_moves():
    net = ConvNet()
    optimizer = MuonAdamW(net, 0.1)
    before = copy.deepcopy(net.state_dict())
    optimizer.found_inf = torch.tensor(1.0)
    with pytest.raises(AssertionError, match="found_inf"):
        train(net, optimizer, [0])
    assert_same(net.state_dict(), before)


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_goes_on_from_its_saved_state(fused, tmp_path):
    def start(seed):
        net = ConvNet(seed).to(memory_format=torch.channels_last)
        optimizer = MuonAdamW(net, 0.1, weight_decay=0.1, fused=fused)
        return net, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def go(run, steps):
        net, optimizer, scheduler = run
        for step in steps:
            train(net, optimizer, [step])
            scheduler.step()

    whole = start(seed=0)
    go(whole, range(3))
    torch.save([part.state_dict() for part in whole], tmp_path / "state.pt")
    go(whole, range(3, 6))
    resumed = start(seed=1)
    go(resumed, range(1))  # what is loaded replaces what was there
    for part, state in zip(resumed, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    go(resumed, range(3, 6))
    assert_same(resumed[0].state_dict(), whole[0].state_dict())
    assert_same(resumed[1].state_dict()["state"], whole[1].state_dict()["state"])


def test_a_scheduler_sets_both_parts():
    net = ConvNet()
    optimizer = MuonAdamW(net, 0.1, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 if step == 0 else 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]
    train(net, optimizer, [0])
    scheduler.step()
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer, [1])
    assert_same(net.state_dict(), before)


def test_parameters_without_a_gradient_are_left_alone():
    net = ConvNet()
    optimizer = MuonAdamW(net, 0.1, weight_decay=0.1)
    for layer in (net.hidden[0], net.first):
        layer.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer, [0])
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith(("hidden.0", "first"))}


def test_a_gradient_scaler_steps_it():
    net, other = ConvNet(), ConvNet()
    optimizer = MuonAdamW(net, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for step, fault in enumerate([1.0, torch.inf, 1.0]):
        net.zero_grad()
        backward(net, step)
        for parameter in net.parameters():
            parameter.grad *= 4.0 * fault
        scaler.scale(torch.tensor(0.0))  # it scales lazily, and backward is not its
        scaler.step(optimizer)
        scaler.update(4.0)
    train(other, MuonAdamW(other, 0.1), [0, 2])
    assert_same(net.state_dict(), other.state_dict())


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = ConvNet()

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(batches(), batch_size=None)

    def configure_optimizers(self):
        optimizer = MuonAdamW(self.net, 0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 2, 6, 6, generator=generator) for _ in range(6)]


def test_lightning_accumulates_clips_and_schedules_as_a_loop_by_hand():
    module, net = Regression(), ConvNet()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=0.01,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    optimizer = MuonAdamW(net, 0.1)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
        net.zero_grad()
        for batch in batches()[2 * step : 2 * step + 2]:
            (net(batch).square().mean() / 2).backward()
        in_order = [p for group in optimizer.param_groups for p in group["params"]]  # a sum's last bits depend on it
        assert nn.utils.clip_grad_norm_(in_order, 0.01) > 0.01
        optimizer.step()
    assert_same(module.net.state_dict(), net.state_dict())


def test_it_learns_faster_than_adamw():
    teacher, generator = ConvNet(seed=5), torch.Generator().manual_seed(0)
    x = torch.randn(32, 2, 6, 6, generator=generator)
    target = teacher(x).detach()

    def final_loss(optimizer_of):
        net = ConvNet()
        optimizer = optimizer_of(net)
        for _ in range(45):
            loss = nn.functional.mse_loss(net(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    adamw = min(final_loss(lambda net, lr=lr: torch.optim.AdamW(net.parameters(), lr)) for lr in (3e-3, 1e-2, 3e-2))
    assert final_loss(lambda net: MuonAdamW(net, 1e-2)) < 0.8 * adamw
