import pytest
import torch
from torch import Tensor, nn

from fmlit.core.tensors import expand_time
from fmlit.flows.losses import flow_matching_loss, prediction_loss, score_matching_loss
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, CosinePath, GaussianPath, VPPath
from fmlit.flows.predictions import MAX_GAIN, Data, Noise, PreconditionedVelocity, Score, Velocity
from fmlit.models.generative_model import GenerativeModel
from fmlit.models.mlp import MLP
from tests.helpers.oracle import PATHS

LOSSES = [flow_matching_loss, score_matching_loss]
STD = 0.6  # of the data in the closed forms


class Sine(nn.Module):
    """A network with a closed form."""

    def forward(self, x, t, labels):
        return x.sin()


def draws(n: int, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """z of mean 1 and standard deviation STD, eps, t."""
    g = torch.Generator().manual_seed(seed)
    z = 1 + STD * torch.randn(n, *shape, generator=g, dtype=torch.float64)
    eps = torch.randn(n, *shape, generator=g, dtype=torch.float64)
    return z, eps, 0.05 + 0.9 * torch.rand(n, generator=g, dtype=torch.float64)


def single(dimension: int) -> GaussianMixture:
    return GaussianMixture(torch.ones(1, dimension, dtype=torch.float64), STD)


def coefficients(path: GaussianPath, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return path.alpha(t), path.beta(t), path.alpha_dot(t), path.beta_dot(t)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_flow_matching_on_the_oracle_is_the_residual_variance(path):
    """Var(u | x) = (std W)^2 / (alpha^2 std^2 + beta^2): what no network can learn away."""
    (z, eps, t), exact = draws(4000, (32,)), single(32)
    losses = flow_matching_loss(lambda x, t: exact.velocity(x, path, t), path, z, eps, t)
    alpha, beta, alpha_dot, beta_dot = coefficients(path, t)
    residual = (STD * (alpha_dot * beta - alpha * beta_dot)) ** 2 / ((alpha * STD) ** 2 + beta**2)
    assert losses.shape == (4000,)
    assert (losses / residual).mean().item() == pytest.approx(1, abs=0.02)  # chi^2 over 128,000 draws: +-0.004

    # any other field costs exactly its distance from the oracle besides, in the mean
    other = flow_matching_loss(lambda x, t: exact.velocity(x, path, t) + 0.7, path, z, eps, t)
    scale = residual.sqrt().mean().item()
    assert (other - losses).mean().item() == pytest.approx(0.49, abs=0.03 * scale)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_score_matching_on_the_oracle_is_the_residual_variance_of_the_noise(path):
    """Var(eps | x) = alpha^2 std^2 / (alpha^2 std^2 + beta^2), at every time of order 1 or less."""
    (z, eps, t), exact = draws(4000, (32,)), single(32)
    losses = score_matching_loss(lambda x, t: exact.score(x, path, t), path, z, eps, t)
    alpha, beta, _, _ = coefficients(path, t)
    residual = (alpha * STD) ** 2 / ((alpha * STD) ** 2 + beta**2)
    assert (losses / residual).mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_score_matching_of_a_noise_predictor_is_ddpms_loss(path):
    z, eps, t = draws(16, (3, 4))
    model = GenerativeModel(Sine(), path, Noise(), z.shape[1:])
    losses = score_matching_loss(model.score, path, z, eps, t)
    ddpm = (path.sample(z, eps, t).sin() - eps).square().mean((1, 2))
    torch.testing.assert_close(losses, ddpm, rtol=1e-10, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_score_matching_is_the_denoising_loss_times_beta_squared(path):
    z, eps, t = draws(16, (3, 4))
    losses = score_matching_loss(lambda x, t: x.sin(), path, z, eps, t)
    x = path.sample(z, eps, t)
    plain = (x.sin() - path.conditional_score(x, z, t)).square().mean((1, 2))
    torch.testing.assert_close(losses, path.beta(t) ** 2 * plain, rtol=1e-9, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_preconditioning_makes_flow_matching_a_plain_regression(path):
    z, eps, t = draws(16, (3, 4))
    prediction = PreconditionedVelocity(STD)
    model = GenerativeModel(Sine(), path, prediction, z.shape[1:])
    weight = prediction.gains(path, t).velocity ** -2
    losses = flow_matching_loss(model.velocity, path, z, eps, t, weight)
    shown = prediction.network_input(path, path.sample(z, eps, t), t)
    target = prediction.target(path, z, eps, t)
    torch.testing.assert_close(losses, (shown.sin() - target).square().mean((1, 2)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("prediction", [Velocity(), Noise(), Data(), Score(), PreconditionedVelocity()], ids=repr)
def test_regression_on_the_prediction_is_either_loss_where_its_gain_is_not_clipped(path, prediction):
    z, eps, t = draws(16, (3, 4))
    t, gains = 0.2 + 0.6 * t, prediction.gains(path, 0.2 + 0.6 * t)
    model = GenerativeModel(Sine(), path, prediction, z.shape[1:])
    cases = [
        (prediction.flow_matching_weight(path, t), gains.velocity, flow_matching_loss, model.velocity),
        (prediction.score_matching_weight(path, t), gains.noise, score_matching_loss, model.score),
    ]
    for weight, gain, loss, field in cases:
        scale = gains.velocity**-2 if isinstance(prediction, PreconditionedVelocity) else None
        expected = loss(field, path, z, eps, t, scale if loss is flow_matching_loss else None)
        losses = prediction_loss(model, prediction, path, z, eps, t, weight)
        inside = gain <= MAX_GAIN
        assert inside.sum() >= 4
        torch.testing.assert_close(losses[inside], expected[inside], rtol=1e-9, atol=0)


def test_the_gradient_is_that_of_the_regression_on_the_marginal_field():
    """Theorem 2 of Lipman et al.: for u_theta = theta x both losses pull theta alike."""
    (z, eps, t), path, exact = draws(20_000, (16,)), CosinePath(), single(16)
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (conditional,) = torch.autograd.grad(
        flow_matching_loss(lambda x, t: theta * x, path, z, eps, t).mean(), theta, retain_graph=True
    )
    x = path.sample(z, eps, t)
    marginal_loss = (theta * x - exact.velocity(x, path, t)).square().mean()
    (marginal,) = torch.autograd.grad(marginal_loss, theta)
    assert conditional.item() == pytest.approx(marginal.item(), rel=0.01)
    assert abs(marginal.item()) > 1


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_and_losses_belong_to_samples(loss):
    z, eps, t = draws(4, (4,))  # a width that equals the batch size would hide a wrong broadcast
    path, weight = CondOTPath(), torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    plain = loss(lambda x, t: torch.zeros_like(x), path, z, eps, t)
    weighted = loss(lambda x, t: torch.zeros_like(x), path, z, eps, t, weight)
    torch.testing.assert_close(weighted, weight * plain, rtol=1e-12, atol=0)
    alone = torch.cat([loss(lambda x, t: torch.zeros_like(x), path, z[[i]], eps[[i]], t[[i]]) for i in range(4)])
    torch.testing.assert_close(plain, alone, rtol=1e-12, atol=0)
    target = eps if loss is score_matching_loss else path.velocity(z, eps, t)
    torch.testing.assert_close(plain, target.square().mean(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_field_is_asked_on_the_path(loss):
    (z, eps, t), path, asked = draws(4, (4,)), CosinePath(), []

    def field(x: Tensor, t: Tensor) -> Tensor:
        asked.append((x, t))
        return x

    loss(field, path, z, eps, t)
    ((x, time),) = asked
    assert torch.equal(time, t)
    torch.testing.assert_close(x, expand_time(path.alpha(t), z) * z + expand_time(path.beta(t), eps) * eps)


def test_a_score_network_is_regressed_on_the_score():
    z, eps, t = draws(16, (12,))
    path = CondOTPath()
    model = GenerativeModel(Sine(), path, Score(), z.shape[1:])
    losses = score_matching_loss(model.score, path, z, eps, t)
    residual = path.sample(z, eps, t).sin() + eps / (1 - t)[:, None]
    torch.testing.assert_close(losses, ((1 - t)[:, None] * residual).square().mean(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 1, 1), (1, 1)])
def test_what_would_be_broadcast_is_refused(loss, shape):
    z, eps, t = torch.randn(4, 1), torch.randn(4, 1), torch.rand(4)
    with pytest.raises(ValueError, match="must have the same shape"):
        loss(lambda x, t: torch.zeros(shape), CondOTPath(), z, eps, t)
    if shape != (4,):
        with pytest.raises(ValueError, match="weight and t must have the same shape"):
            loss(lambda x, t: torch.zeros_like(x), CondOTPath(), z, eps, t, torch.ones(shape))
    for call in (CondOTPath().sample, CondOTPath().velocity, VPPath().velocity):
        with pytest.raises(ValueError, match="z and eps must have the same shape"):
            call(z, torch.randn(shape), t)
    with pytest.raises(ValueError, match="t must have shape"):
        CondOTPath().velocity(z, eps, torch.rand(7))


def test_a_network_of_another_shape_is_named():
    model = GenerativeModel(MLP((1,)), CondOTPath(), Velocity(), (2,))
    model.net.forward = lambda x, t, labels: x[:, :1]
    with pytest.raises(ValueError, match=r"output of MLP and x must have the same shape, got \(4, 1\) and \(4, 2\)"):
        model.velocity(torch.randn(4, 2), torch.rand(4))
