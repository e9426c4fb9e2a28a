import pytest
import torch
from torch import Tensor

from fmlit.core.tensors import expand_time
from fmlit.flows.diffusions import (
    BetaDiffusion,
    ConstantDiffusion,
    Diffusion,
    ReverseDiffusion,
    brownian_motion,
    ode_drift,
    ornstein_uhlenbeck,
    sde_drift,
)
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, CosinePath, GaussianPath, PolynomialPath, VPPath

PATHS = [CondOTPath(), CosinePath(), PolynomialPath(2.0), VPPath()]
TIMES = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


def points(generator_seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(generator_seed)
    return torch.randn(len(TIMES), 7, generator=generator, dtype=torch.float64)  # width equals batch size


@pytest.mark.parametrize("path", PATHS)
def test_reverse_diffusion_is_andersons_time_reversal(path: GaussianPath) -> None:
    # Forward in s = 1 - t: dX = f X ds + g dW with f = d log alpha / ds. Its reversal, written in t, has the drift
    # -f x + g^2 score. That this is u + g^2 / 2 score is a statement about u, and fixes g.
    mixture = GaussianMixture(points(1)[:3], 0.5)
    x, diffusion = points(), ReverseDiffusion().along(path)
    drift = sde_drift(lambda x, t: mixture.velocity(x, path, t), lambda x, t: mixture.score(x, path, t), diffusion)
    f = -path.alpha_dot(TIMES) / path.alpha(TIMES)
    expected = -expand_time(f, x) * x + diffusion(x, TIMES) ** 2 * mixture.score(x, path, TIMES)
    torch.testing.assert_close(drift(x, TIMES), expected, rtol=1e-10, atol=1e-10)


def test_reverse_diffusion_on_vp_is_ddpms_rate() -> None:
    path = VPPath(rate_min=0.1, rate_max=20.0)
    rate = 0.1 + (1 - TIMES) * 19.9
    torch.testing.assert_close(ReverseDiffusion()(path, TIMES), rate.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ReverseDiffusion(0.5)(path, TIMES), 0.5 * rate.sqrt(), rtol=1e-12, atol=0)
    # finite up to the end, in float32 too, although beta_dot is not
    torch.testing.assert_close(ReverseDiffusion()(path, torch.tensor([1.0])), torch.tensor([0.1]).sqrt())


@pytest.mark.parametrize("path", PATHS)
def test_constant_and_beta_diffusion(path: GaussianPath) -> None:
    assert torch.equal(ConstantDiffusion(0.7)(path, TIMES), torch.full_like(TIMES, 0.7))
    assert torch.equal(BetaDiffusion(2.0)(path, TIMES), 2 * path.beta(TIMES))
    assert BetaDiffusion().along(path)(points(), TIMES).shape == (7, 1)


@pytest.mark.parametrize("diffusion", [ConstantDiffusion(1.5), BetaDiffusion(), ReverseDiffusion()])
def test_marginals_satisfy_the_fokker_planck_equation(diffusion: Diffusion) -> None:
    # dp/dt = -d(drift p)/dx + sigma_t^2 / 2 d^2p/dx^2, for the density of a mixture in one dimension
    path, h = CosinePath(), 1e-4
    mixture = GaussianMixture(torch.tensor([[-1.0], [0.5]], dtype=torch.float64), [0.3, 0.6])
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]
    sigma = diffusion.along(path)
    drift = sde_drift(lambda x, t: mixture.velocity(x, path, t), lambda x, t: mixture.score(x, path, t), sigma)

    def density(x: Tensor, t: Tensor) -> Tensor:
        return mixture.log_prob(x, path, t).exp()

    def flux(x: Tensor) -> Tensor:
        return drift(x, TIMES)[:, 0] * density(x, TIMES)

    rate = (density(x, TIMES + h) - density(x, TIMES - h)) / (2 * h)
    transport = (flux(x + h) - flux(x - h)) / (2 * h)
    spread = (density(x + h, TIMES) - 2 * density(x, TIMES) + density(x - h, TIMES)) / h**2
    torch.testing.assert_close(rate, -transport + sigma(x, TIMES)[:, 0] ** 2 / 2 * spread, rtol=1e-5, atol=1e-5)


def test_ode_drift_undoes_sde_drift() -> None:
    path, x = CondOTPath(), points()
    sigma = BetaDiffusion(1.5).along(path)
    drift = sde_drift(lambda x, t: x.sin(), lambda x, t: -x, sigma)
    assert not torch.allclose(drift(x, TIMES), x.sin())
    torch.testing.assert_close(ode_drift(drift, lambda x, t: -x, sigma)(x, TIMES), x.sin())


def test_linear_examples() -> None:
    x = points()
    drift, diffusion = ornstein_uhlenbeck(0.5, 2.0)
    assert torch.equal(drift(x, TIMES), -0.5 * x)
    assert torch.equal(diffusion(x, TIMES), torch.full((7, 1), 2.0, dtype=torch.float64))
    drift, diffusion = brownian_motion(3.0)
    assert not drift(x, TIMES).any()
    assert torch.equal(diffusion(x, TIMES), torch.full((7, 1), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("make", [ConstantDiffusion, BetaDiffusion, ReverseDiffusion])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_negative_coefficients_are_refused(make: type, value: float) -> None:
    with pytest.raises(ValueError, match=f"{make.__name__}.*not negative, got {value}"):
        make(value)


def test_a_negative_sigma_of_a_users_diffusion_is_refused() -> None:
    class Falling(Diffusion):
        def __call__(self, path: GaussianPath, t: Tensor) -> Tensor:
            return 0.5 - t

    with pytest.raises(ValueError, match=r"sigma_t must not be negative, got -0\.45"):
        Falling().along(CondOTPath())(points(), TIMES)
    with pytest.raises(ValueError, match="sigma must be finite and not negative, got -1"):
        ornstein_uhlenbeck(1.0, -1.0)
