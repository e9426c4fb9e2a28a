import copy

import pytest
import torch
from torch import nn

from fmlit.core.errors import UserError
from fmlit.training.gradients import GradientGuard


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Linear(5, 3)
    net(torch.randn(7, 5)).square().sum().backward()
    return net


def gradients(net):
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize(
    ("clip", "algorithm"), [(0.1, "norm"), (0.1, None), (0.1, "value"), (1e6, "norm"), (None, None)]
)
def test_gradients_are_clipped_as_torch_does(clip, algorithm, net):
    expected = copy.deepcopy(net)
    for own, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        theirs.grad = own.grad.clone()
    if clip:
        by_value = algorithm == "value"
        (nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_)(expected.parameters(), clip)
    GradientGuard().admit(torch.optim.AdamW(net.parameters()), 12, clip, algorithm)
    assert all(map(torch.equal, gradients(net), gradients(expected)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_named_with_the_images_and_the_loss(value, net):
    guard = GradientGuard()
    guard.note(torch.ones(4))
    guard.check()
    net.weight.grad[1, 2] = value
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    with pytest.raises(UserError, match=r"^the gradient is not finite after 1,200 images; weights and"):
        guard.admit(optimizer, 1200, 1.0, "norm")
    guard.note(torch.tensor([1.0, value]))
    with pytest.raises(UserError, match=r"after 1,200 images, where the loss was not finite on rank 0; "):
        guard.check()  # it still knows when that began


def test_a_fused_optimiser_skips_the_step_where_something_was_not_finite(net):
    """What ``admit`` relies on where it does not wait for the device: torch's own protocol with gradient scalers."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))
    optimizer.found_inf = torch.tensor(1.0)
    net.weight.grad[0, 0] = torch.nan
    optimizer.step()
    after = (net.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    optimizer.found_inf = torch.tensor(0.0)
    net.weight.grad[0, 0] = 0
    optimizer.step()
    assert not torch.equal(net.weight, before[0]["weight"])


def test_with_scaled_gradients_a_loss_that_is_not_finite_ends_the_run():
    guard = GradientGuard()
    guard.scaled = True
    for losses in ([1.0], [1.0, torch.nan], [2.0], [torch.inf]):  # one at a time a scaler may outlive
        guard.note(torch.tensor(losses))
        guard.check()
        guard.check()
    guard.note(torch.tensor([1.0, torch.nan]))
    with pytest.raises(UserError, match=r"the loss is not finite on rank 0: use trainer\.precision"):
        guard.check()
