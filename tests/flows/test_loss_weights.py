import copy

import pytest
import torch
from torch import nn

from fmlit.flows.loss_weights import LearnedLossWeight
from fmlit.flows.paths import CondOTPath, CosinePath, PolynomialPath, VPPath

PATHS = [CondOTPath(), CosinePath(), PolynomialPath(2.0), VPPath()]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


def trained_once():
    """A LearnedLossWeight that is not zero."""
    uncertainty = LearnedLossWeight(features=16)
    torch.manual_seed(3)
    nn.init.normal_(uncertainty.output.weight, std=0.3)
    nn.init.constant_(uncertainty.output.bias, 0.2)
    return uncertainty


def test_at_first_it_weighs_nothing():
    losses, t = torch.rand(5), torch.rand(5)
    uncertainty = LearnedLossWeight()
    assert torch.equal(uncertainty(CondOTPath(), t), torch.zeros(5))
    assert torch.equal(uncertainty.weigh(losses, CondOTPath(), t), losses)


@every_path
def test_what_is_learned_is_the_logarithm_of_the_mean_loss(path):
    """Losses whose mean falls from e^2 to e^-3 with a bump on the way, and scatters as the mean of four squares."""

    def profile(t):
        return 2 - 5 * t + torch.exp(-((t - 0.4) ** 2) / 0.05)

    uncertainty, generator = LearnedLossWeight(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(uncertainty.parameters())
    steps = 800
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        t = torch.rand(256, generator=generator)
        losses = profile(t).exp() * torch.randn(256, 4, generator=generator).square().mean(1)
        optimizer.zero_grad()
        uncertainty.weigh(losses, path, t).mean().backward()
        optimizer.step()
    t = torch.linspace(0.05, 0.95, 100)
    error = (uncertainty(path, t) - profile(t)).detach()
    assert error.abs().mean() < 0.05
    assert error.abs().max() < 0.3


def test_the_network_gets_the_gradient_of_its_loss_over_exp_u():
    torch.manual_seed(0)
    weight, inputs, t = torch.randn(3, requires_grad=True), torch.randn(6, 3), torch.rand(6)
    losses, uncertainty = (inputs @ weight).square(), trained_once()
    (gradient,) = torch.autograd.grad(uncertainty.weigh(losses, CondOTPath(), t).sum(), weight, retain_graph=True)
    each = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses])
    u = uncertainty(CondOTPath(), t)
    assert u.std() > 0.1
    torch.testing.assert_close(gradient, (each / u.exp()[:, None]).sum(0))


@every_path
def test_it_is_finite_at_both_ends_and_so_are_its_gradients(path):
    uncertainty = trained_once()
    u = uncertainty(path, torch.tensor([0.0, 1e-7, 0.5, 1 - 1e-7, 1.0]))
    assert u.shape == (5,)
    assert torch.isfinite(u).all()
    assert u.std() > 0.01
    u.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in uncertainty.parameters() if p.requires_grad)


def test_it_is_a_function_of_the_noise_level_alone():
    sigma, uncertainty = torch.logspace(-2, 1, 7, dtype=torch.float64), trained_once()
    cond_ot, *others = [uncertainty(path, path.time_of_sigma(sigma)) for path in PATHS]
    for other in others:
        torch.testing.assert_close(other, cond_ot, rtol=1e-3, atol=1e-3)


def test_precision_does_not_touch_it():
    uncertainty, t = trained_once(), torch.rand(8)
    expected = uncertainty(VPPath(), t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(uncertainty(VPPath(), t), expected)
    assert uncertainty.bfloat16()(VPPath(), t).dtype == torch.float32


def test_a_state_dict_carries_all_of_it():
    saved = trained_once()
    loaded = LearnedLossWeight(features=16)
    assert torch.equal(loaded.frequencies, saved.frequencies)  # whatever the state of the global generator
    assert torch.equal(loaded.phases, saved.phases)
    state = copy.deepcopy(saved.state_dict())
    state["frequencies"] = state["frequencies"] * 2
    loaded.load_state_dict(state)
    t = torch.rand(4)
    assert not torch.equal(loaded(CondOTPath(), t), saved(CondOTPath(), t))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(CondOTPath(), t), saved(CondOTPath(), t))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"features must be at least 1, got 0"):
        LearnedLossWeight(features=0)
    with pytest.raises(ValueError, match=r"one loss per time is needed, got shapes \(4, 1\) and \(4,\)"):
        LearnedLossWeight().weigh(torch.ones(4, 1), CondOTPath(), torch.rand(4))
