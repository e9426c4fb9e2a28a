import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fmlit.models.mlp import MLP
from fmlit.models.time_embedding import time_embedding
from fmlit.models.unet import UNet
from fmlit.storage.descriptions import build, describe
from tests.helpers.small_runs import tiny_mlp, tiny_unet

IMAGE, VECTOR = (1, 8, 8), (3,)
EACH = [pytest.param(tiny_unet, IMAGE, id="UNet"), pytest.param(tiny_mlp, VECTOR, id="MLP")]
each_network = pytest.mark.parametrize(("make", "shape"), EACH)


def awake(net: nn.Module) -> nn.Module:
    """The network after what training does first: no weight is zero any more."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.05)
    return net.eval()


def batch(shape: tuple[int, ...], n: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=g), torch.rand(n, generator=g)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_the_default_unet_is_the_fields_cifar10_network():
    with torch.device("meta"):
        assert count(UNet((3, 32, 32))) == 35_746_307  # torchcfm's
        assert count(UNet((3, 32, 32), num_classes=10)) == 35_746_307 + 11 * 512  # ten classes and the null label


def test_a_new_unet_returns_zero_and_its_blocks_the_identity():
    torch.manual_seed(0)
    net = tiny_unet(IMAGE).eval()
    x, t = batch(IMAGE)
    assert torch.equal(net(x, t), torch.zeros_like(x))
    x, embedded = torch.randn(4, 16, 8, 8), torch.randn(4, 64)
    assert torch.equal(net.unet.down_blocks[0].resnets[0](x, embedded), x)
    x = torch.randn(4, 32, 4, 4)
    assert torch.equal(net.unet.down_blocks[1].attentions[0](x), x)


def test_attention_sits_where_it_is_asked_for():
    with torch.device("meta"):
        net = UNet((1, 16, 16), channels=32, multipliers=(1, 2, 2), attention=(8, 4), head_channels=16)
    down = [hasattr(block, "attentions") for block in net.unet.down_blocks]
    up = [hasattr(block, "attentions") for block in net.unet.up_blocks]
    assert down == [False, True, True]  # 16, 8, 4 pixels
    assert up == [True, True, False]  # 4, 8, 16 pixels
    heads = {m.heads for m in net.modules() if type(m).__name__ == "Attention"}
    assert heads == {64 // 16}


def test_the_unets_clock_runs_to_a_thousand():
    net, seen = tiny_unet(IMAGE), []
    net.unet.time_proj.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    x, t = batch(IMAGE)
    net(x, t)
    (steps, embedded), frequencies = seen[0], torch.exp(-math.log(10_000) * torch.arange(8) / 8)
    torch.testing.assert_close(steps, 1000 * t)
    angles = steps[:, None] * frequencies  # Nichol & Dhariwal's embedding: cosines first
    torch.testing.assert_close(embedded, torch.cat([angles.cos(), angles.sin()], 1), rtol=0, atol=1e-4)


def test_time_embedding():
    embedded = time_embedding(torch.tensor([0.0, 0.003]), 6)
    angles = 3 * torch.tensor([1.0, 1e-2, 1e-4])
    torch.testing.assert_close(embedded[0], torch.tensor([1.0, 1, 1, 0, 0, 0]))
    torch.testing.assert_close(embedded[1], torch.cat([angles.cos(), angles.sin()]))


@each_network
def test_every_input_matters_and_every_weight_learns(make, shape):
    net = awake(make(shape, num_classes=5))
    x, t = batch(shape)
    labels = torch.tensor([0, 1, 4, 5])  # 5 is the null label
    out = net(x, t, labels)
    assert out.shape == x.shape
    for other in (net(x + 0.1, t, labels), net(x, t * 0.9, labels), net(x, t, torch.tensor([1, 2, 3, 0]))):
        assert (other - out).flatten(1).norm(dim=1).min() > 1e-3
    out.square().sum().backward()
    # DistributedDataParallel waits for ever for a gradient that does not come
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("channels", [16, 32, 48, 128])
def test_even_the_widest_level_sees_time_and_label(channels):
    """With one channel per group, normalization would take out again what the embedding adds to a channel."""
    net = awake(UNet(IMAGE, 5, channels, multipliers=(1,), blocks=1, attention=(), head_channels=16))
    x, t = batch(IMAGE)
    labels = torch.tensor([0, 1, 4, 5])
    for other in (net(x, t * 0.9, labels), net(x, t, labels.flip(0))):
        assert (other - net(x, t, labels)).flatten(1).norm(dim=1).min() > 1e-3
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert all(m.num_channels >= 4 * m.num_groups for m in norms)
    assert all(m.num_groups == 32 for m in norms if channels == 128)


def test_a_description_keeps_the_groups_of_normalization(monkeypatch):
    """Weights of another grouping have the same shapes: loaded into it, they would sample noise without an error."""
    description = describe(UNet(IMAGE, channels=16, multipliers=(1,), blocks=1, attention=(), head_channels=16))
    monkeypatch.setattr("fmlit.models.unet._norm_groups", lambda channels: 16)  # should the rule ever change
    norms = [m for m in build(description).modules() if isinstance(m, nn.GroupNorm)]
    assert {m.num_groups for m in norms} == {4}
    chosen = UNet(IMAGE, channels=16, multipliers=(1,), blocks=1, attention=(), head_channels=16, norm_groups=2)
    assert {m.num_groups for m in chosen.modules() if isinstance(m, nn.GroupNorm)} == {2}


@each_network
def test_samples_do_not_see_each_other(make, shape):
    net = awake(make(shape, num_classes=5))
    x, t = batch(shape)
    labels = torch.tensor([0, 1, 4, 5])
    alone = torch.cat([net(x[[i]], t[[i]], labels[[i]]) for i in range(4)])
    torch.testing.assert_close(net(x, t, labels), alone, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only():
    net = awake(tiny_unet(IMAGE, dropout=0.5))
    x, t = batch(IMAGE)
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


@pytest.mark.parametrize("make", [tiny_unet, tiny_mlp])
def test_arguments_are_kept(make):
    net = make([1, 8, 8], 3)
    assert (net.shape, net.num_classes) == ((1, 8, 8), 3)
    for name, value in make.keywords.items():
        assert getattr(net, name) == value


def test_an_mlp_flattens_any_shape():
    x, t = batch((2, 3, 5))
    assert tiny_mlp((2, 3, 5))(x, t).shape == x.shape


WRONG = [
    (partial(UNet, (2,)), "UNet needs images .* got shape (2,); use MLP"),
    (partial(UNet, IMAGE, multipliers=()), "at least 1, got 128, 2, 64 and ()"),
    (partial(UNet, IMAGE, multipliers=(1, 0)), "at least 1, got 128, 2, 64 and (1, 0)"),
    (partial(UNet, IMAGE, multipliers=(1, 2), head_channels=0), "at least 1, got 128, 2, 0 and"),
    (partial(UNet, IMAGE, blocks=0), "at least 1, got 128, 0, 64"),
    (partial(UNet, (1, 28, 28), multipliers=(1, 2, 2, 2)), "28x28 is not divisible by 8"),
    (partial(UNet, IMAGE, channels=64, multipliers=(1,), norm_groups=3), "norm_groups 3 does not divide the widths"),
    (partial(UNet, IMAGE, multipliers=(1, 2), attention=(16,)), "attention 16 is not among the resolutions [8, 4]"),
    (partial(UNet, IMAGE, channels=48, multipliers=(1, 2), attention=(8,)), "head_channels 64 does not divide .* 48"),
    (partial(UNet, IMAGE, channels=48, multipliers=(1, 2), attention=()), "head_channels 64 does not divide .* 96"),
    (partial(MLP, VECTOR, width=7), "even width and a depth of at least 1, got width 7 and depth 3"),
    (partial(MLP, VECTOR, depth=0), "got width 256 and depth 0"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_what_cannot_be_built_is_named(make, message):
    escaped = message.translate(str.maketrans({c: f"\\{c}" for c in "()[]"}))
    with pytest.raises(ValueError, match=escaped):
        make()
