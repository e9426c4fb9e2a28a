"""What ``MuonAdamW`` does to a weight, against torch's own Muon and AdamW."""

import copy

import pytest
import torch
from torch import nn

from fmlit.models.unet import UNet
from fmlit.training import muon
from fmlit.training.muon import MuonAdamW, hidden_matrices, orthogonalize
from tests.helpers.small_convnet import ConvNet, assert_same, backward


def matrices_with_gradients(*shapes):
    """A network of Linear layers, and the gradients of three steps for each of their weights."""
    torch.manual_seed(1)
    net = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
    return net, [[torch.randn(shape) for shape in shapes] for _ in range(3)]


def follow(optimizer, parameters, gradients):
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def test_hidden_matrices_are_wide_layers_that_do_not_touch_the_data():
    net = nn.ModuleDict(
        {
            "from_data": nn.Conv2d(3, 64, 3),
            "kernel": nn.Conv2d(64, 16, 3),
            "depthwise": nn.Conv2d(64, 64, 3, groups=64),
            "transposed": nn.ConvTranspose2d(64, 64, 2),
            "labels": nn.Embedding(20, 64),
            "norm": nn.LayerNorm([20, 20]),
            "line": nn.Conv1d(16, 17, 1),
            "linear": nn.Linear(64, 16),
            "to_data": nn.Linear(64, 15),
        }
    )
    net["tied"] = net["linear"]
    expected = [net[name].weight for name in ("kernel", "line", "linear")]
    assert [id(p) for p in hidden_matrices(net)] == [id(p) for p in expected]


def test_in_the_unet_muon_has_nearly_all_weights_but_not_those_at_the_data():
    net = UNet((1, 8, 8), 10, channels=32, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=32)
    names = {id(p): name for name, p in net.named_parameters()}
    chosen = [names[id(p)] for p in hidden_matrices(net)]
    others = set(names.values()) - set(chosen)
    assert {"unet.conv_in.weight", "unet.conv_out.weight", "unet.class_embedding.weight"} <= others
    assert all("norm" in name or name.endswith("bias") for name in others if name.count(".") > 2)
    assert sum(p.numel() for p in hidden_matrices(net)) > 0.97 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("net", "settings", "message"),
    [
        (nn.Conv2d(3, 64, 3), {}, r"^Conv2d has no hidden matrix for Muon, .* 16 channels on both sides: use AdamW"),
        (nn.Linear(16, 16), {"betas": (1.0, 0.9)}, "beta parameter at index 0: 1.0"),
        (nn.Linear(16, 16), {"weight_decay": -1.0}, "weight_decay value: -1.0"),
    ],
)
def test_what_cannot_be_is_refused(net, settings, message):
    with pytest.raises(ValueError, match=message):
        MuonAdamW(net, lr=0.1, **settings)


@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_follow_torchs_muon(nesterov, monkeypatch):
    """In bfloat16, as torch computes; batched products round differently, which Newton-Schulz amplifies."""
    monkeypatch.setattr(muon, "_precision", lambda device: torch.bfloat16)
    net, gradients = matrices_with_gradients((16, 40), (40, 16), (16, 40), (24, 24))
    theirs = copy.deepcopy(net)
    settings = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9, "nesterov": nesterov}
    own_optimizer = MuonAdamW(net, **settings)
    their_optimizer = torch.optim.Muon(theirs.parameters(), **settings, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in net.parameters()]
    follow(own_optimizer, list(net.parameters()), gradients)
    follow(their_optimizer, list(theirs.parameters()), gradients)
    for own, their, start in zip(net.parameters(), theirs.parameters(), before, strict=True):
        assert_same(own_optimizer.state[own]["momentum_buffer"], their_optimizer.state[their]["momentum_buffer"])
        assert (own - their).norm() < 0.02 * (their - start).norm()


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_an_update_is_orthogonal_with_the_root_mean_square_of_adamw(shape):
    net, gradients = matrices_with_gradients(shape)
    before = net[0].weight.detach().clone()
    follow(MuonAdamW(net, lr=0.01), [net[0].weight], gradients[:1])
    update = (before - net[0].weight.detach()) / 0.01
    values = torch.linalg.svdvals(update) / (0.2 * max(shape) ** 0.5)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)
    # It keeps the gradient's singular vectors.
    u, _, v = torch.linalg.svd(gradients[0][0], full_matrices=False)
    turned = u.mT @ update @ v.mT
    assert (turned - turned.diag().diag()).norm() < 1e-3 * turned.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_in_either_precision(dtype):
    torch.manual_seed(0)
    matrices = torch.randn(3, 20, 50, dtype=torch.float64)
    matrices[2] *= 1e6
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    for given, factor in ((matrices, u @ v), (matrices.mT, (u @ v).mT)):
        orthogonal = orthogonalize(given.to(dtype))
        assert orthogonal.dtype == dtype
        assert orthogonal.shape == given.shape
        values = torch.linalg.svdvals(orthogonal.double())
        assert values.min() > 0.6
        assert values.max() < 1.3
        assert (orthogonal.double() - factor).norm() < 0.3 * factor.norm()
    assert not orthogonalize(torch.zeros(1, 20, 50, dtype=dtype)).any()


def test_a_kernel_moves_as_its_matrix_does():
    torch.manual_seed(0)
    kernel, gradients = nn.Conv2d(18, 20, 3, bias=False), [[torch.randn(20, 18, 3, 3)] for _ in range(3)]
    matrix = nn.Linear(18 * 9, 20, bias=False)
    matrix.weight.data = kernel.weight.detach().flatten(1).clone()
    follow(MuonAdamW(kernel, 0.1, weight_decay=0.1), [kernel.weight], gradients)
    follow(MuonAdamW(matrix, 0.1, weight_decay=0.1), [matrix.weight], [[g.flatten(1)] for [g] in gradients])
    assert_same(kernel.weight.detach().flatten(1), matrix.weight.detach())


def test_matrices_of_one_shape_do_not_mix():
    net, gradients = matrices_with_gradients((16, 40), (16, 40), (16, 40))
    alone = copy.deepcopy(net)
    follow(MuonAdamW(net, 0.1), list(net.parameters()), gradients)
    for i, layer in enumerate(alone):
        follow(MuonAdamW(layer, 0.1), [layer.weight], [[step[i]] for step in gradients])
        torch.testing.assert_close(net[i].weight, layer.weight, rtol=1e-4, atol=1e-5)


def test_the_memory_format_makes_no_difference_and_is_kept():
    net = ConvNet()
    moved = copy.deepcopy(net).to(memory_format=torch.channels_last)
    strides = [p.stride() for p in moved.parameters()]
    assert strides != [p.stride() for p in net.parameters()]
    ours, theirs = MuonAdamW(net, 0.1, weight_decay=0.1), MuonAdamW(moved, 0.1, weight_decay=0.1)
    for step in range(3):
        backward(net, step)
        for parameter, other in zip(net.parameters(), moved.parameters(), strict=True):
            other.grad = torch.empty_like(other).copy_(parameter.grad)
        ours.step()
        theirs.step()
    assert_same(list(moved.parameters()), list(net.parameters()))
    assert [p.stride() for p in moved.parameters()] == strides


@pytest.mark.parametrize("fused", [True, False])
def test_everything_else_follows_adamw_bit_for_bit(fused):
    net, extra = ConvNet(), nn.Parameter(torch.tensor([1.0, -2.0]))
    taken = set(hidden_matrices(net))
    rest = [p for p in net.parameters() if p not in taken] + [extra]
    assert len(rest) == 10
    copies = [nn.Parameter(p.detach().clone()) for p in rest]
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "fused": fused}
    optimizer, adamw = MuonAdamW(net, **settings, others=[extra]), torch.optim.AdamW(copies, **settings)
    for step in range(4):
        backward(net, step)
        extra.grad = extra.detach().clone()
        for parameter, other in zip(rest, copies, strict=True):
            other.grad = parameter.grad.clone()
        optimizer.step()
        adamw.step()
        assert_same(rest, copies)
    assert optimizer.param_groups[0]["fused"] is fused
