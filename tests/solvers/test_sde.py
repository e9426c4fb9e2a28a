import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from fmlit import solvers
from fmlit.core.tensors import Field, expand_time
from fmlit.flows.diffusions import (
    BetaDiffusion,
    ConstantDiffusion,
    Diffusion,
    ReverseDiffusion,
    brownian_motion,
    ornstein_uhlenbeck,
    sde_drift,
)
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, GaussianPath
from fmlit.flows.predictions import Velocity
from fmlit.sampling.grids import LogitSNRGrid
from fmlit.solvers.records import SOLVERS, solver_names

BOTH = [solvers.euler_maruyama, solvers.stochastic_heun]
THETA, MU, SIGMA = 1.0, 0.4, 0.8


def grid(steps: int, end: float = 1.0) -> Tensor:
    return torch.linspace(0, end, steps + 1, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def geometric() -> tuple[Field, Field]:
    """dX = MU X dt + SIGMA X dW (Ito): X_t = x0 exp((MU - SIGMA^2 / 2) t + SIGMA W_t), E[X_t] = x0 exp(MU t)."""
    return lambda x, t: MU * x, lambda x, t: SIGMA * x


def observed_order(steps: list[int], errors: list[float]) -> float:
    return -stats.linregress([math.log(n) for n in steps], [math.log(e) for e in errors]).slope


def on_one_brownian_path(fine: Tensor, steps: int):
    """``noise`` for ``steps`` equal steps from the standard normals of a finer partition, (fine steps, B, 1)."""
    sums = fine.unflatten(0, (steps, -1)).sum(1) / math.sqrt(len(fine) / steps)
    return lambda i, like: sums[i]


@pytest.mark.parametrize("solver", BOTH)
def test_strong_order_one_half_with_multiplicative_noise(solver) -> None:
    # mean error at t = 1 over 4,000 paths, against the Ito solution on the same Brownian path
    steps, fine, x0 = [16, 32, 64, 128], normal(128, 4000, 1), torch.ones(4000, 1, dtype=torch.float64)
    exact = torch.exp(MU - SIGMA**2 / 2 + SIGMA * fine.sum(0) / math.sqrt(128))
    results = [solver(*geometric(), x0, grid(n), noise=on_one_brownian_path(fine, n)) for n in steps]
    errors = [(x - exact).abs().mean().item() for x in results]
    assert observed_order(steps, errors) == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("solver", BOTH)
def test_strong_order_one_with_additive_noise(solver) -> None:
    # dX = -sin(2 X) dt + (1 + t / 2) dW over 500 paths; reference: Euler-Maruyama with 2,048 steps on the same path
    steps, fine, x0 = [8, 16, 32, 64], normal(2048, 500, 1), normal(500, 1, seed=1)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return -torch.sin(2 * x)

    def diffusion(x: Tensor, t: Tensor) -> Tensor:
        return expand_time(1 + t / 2, x)

    reference = solvers.euler_maruyama(drift, diffusion, x0, grid(2048), noise=on_one_brownian_path(fine, 2048))
    results = [solver(drift, diffusion, x0, grid(n), noise=on_one_brownian_path(fine, n)) for n in steps]
    errors = [(x - reference).abs().mean().item() for x in results]
    assert observed_order(steps, errors) == pytest.approx(1, abs=0.2)


def linear_moments(solver, steps: int, growth: float = 0.0) -> tuple[float, float]:
    """Mean and variance at t = 1 of dX = -THETA X dt + (1 + growth t) dW from x0 = 1, exactly.

    The result is linear in the normals: sample 0 gets none of them, sample j only that of step j - 1, of size 1.
    """
    x0 = torch.ones(steps + 1, 1, dtype=torch.float64)
    unit = torch.eye(steps + 1, dtype=torch.float64)[1:, :, None]
    x = solver(
        lambda x, t: -THETA * x,
        lambda x, t: expand_time(1 + growth * t, x),
        x0,
        grid(steps),
        noise=lambda i, _: unit[i],
    )
    return x[0].item(), (x[1:] - x[0]).square().sum().item()


@pytest.mark.parametrize("name", solver_names("SDE"))
@pytest.mark.parametrize("growth", [0.0, 0.5])
def test_weak_order_with_additive_noise(name: str, growth: float) -> None:
    steps, decay, g = [16, 32, 64], math.exp(-2 * THETA), growth
    # integral_0^1 e^(-2 (1 - s)) (1 + g s)^2 ds, by parts; THETA = 1
    variance = (1 - decay) / 2 + 2 * g * (1 + decay) / 4 + g**2 * (1 - decay) / 4
    moments = [linear_moments(SOLVERS[name].function, n, growth) for n in steps]
    for exact, measured in zip((math.exp(-THETA), variance), zip(*moments, strict=True), strict=True):
        assert observed_order(steps, [abs(m - exact) for m in measured]) == pytest.approx(SOLVERS[name].order, abs=0.2)


@pytest.mark.parametrize("solver", BOTH)
def test_weak_order_one_and_ito_with_multiplicative_noise(solver) -> None:
    # Mean and second moment depend on two moments of the noise only: all sequences of signs give them exactly.
    # Stratonovich's solution would have the mean exp(MU + SIGMA^2 / 2).
    steps = [4, 6, 8, 12]
    means, seconds = [], []
    for n in steps:
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=n)), dtype=torch.float64).T[..., None]
        x0 = torch.ones(2**n, 1, dtype=torch.float64)
        x = solver(*geometric(), x0, grid(n, 0.5), noise=lambda i, like, signs=signs: signs[i])
        means.append(abs(x.mean().item() - math.exp(MU / 2)))
        seconds.append(abs(x.square().mean().item() - math.exp(MU + SIGMA**2 / 2)))
    assert observed_order(steps, seconds) == pytest.approx(1, abs=0.2)
    assert means[-1] < means[0] < 0.01


@pytest.mark.parametrize("solver", BOTH)
def test_ornstein_uhlenbeck_mean_and_variance(solver) -> None:
    n, end = 20_000, 1.5
    x0 = torch.full((n, 1), 2.0, dtype=torch.float64)
    x = solver(*ornstein_uhlenbeck(THETA, SIGMA), x0, grid(300, end), generator=generator())
    mean, variance = 2 * math.exp(-THETA * end), SIGMA**2 * (1 - math.exp(-2 * THETA * end)) / (2 * THETA)
    assert abs(x.mean().item() - mean) < 3 * math.sqrt(variance / n)
    assert abs(x.var().item() - variance) < 3 * variance * math.sqrt(2 / n)


@pytest.mark.parametrize("solver", BOTH)
def test_brownian_motion_has_independent_increments(solver) -> None:
    n = 20_000
    x = solver(*brownian_motion(2.0), torch.zeros(n, 2).double(), grid(4, 8.0), generator=generator(), trajectory=True)
    assert x.shape == (5, n, 2)
    increments = (x.diff(dim=0) / (2 * math.sqrt(2.0))).permute(0, 2, 1).reshape(8, n)  # unit normals, if correct
    assert ((increments @ increments.T / n - torch.eye(8)).abs() < 3 * math.sqrt(2 / n)).all()
    assert stats.kstest(increments.flatten().numpy(), "norm").pvalue > 1e-3


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64)
    return GaussianMixture(means, 0.35, [0.4, 0.6])


def projected_pvalue(x: Tensor, oracle: GaussianMixture, direction: Tensor) -> float:
    """p of a Kolmogorov-Smirnov test of x along a unit direction against the mixture's exact marginal."""

    def cdf(values):
        parts = zip(oracle.weights, oracle.means @ direction, oracle.stds, strict=True)
        return sum(w.item() * stats.norm.cdf(values, m.item(), s.item()) for w, m, s in parts)

    return stats.kstest((x @ direction).numpy(), cdf).pvalue


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor) -> float:
    return ((x @ directions).sort(0).values - (y @ directions).sort(0).values).square().mean().sqrt().item()


def sample_sde(path: GaussianPath, diffusion: Diffusion, times: Tensor, n: int = 20_000) -> Tensor:
    """Euler-Maruyama from noise at times[0], u and s from one evaluation of the oracle, and a final denoising step."""
    oracle, sigma = mixture(), diffusion.along(path)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return oracle.velocity(x, path, t)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        u = velocity(x, t)
        return sde_drift(lambda x, t: u, lambda x, t: Velocity().score(path, u, x, t), sigma)(x, t)

    x = solvers.euler_maruyama(drift, sigma, path.beta(times[0]) * normal(n, 2), times, generator=generator(1))
    t = times[-1].expand(n)
    return x if times[-1] == 1 else Velocity().data(path, velocity(x, t), x, t)


CONDOT_SNR = LogitSNRGrid(0.002, 80.0).times(CondOTPath(), 200)


@pytest.mark.parametrize(
    ("diffusion", "times"),
    [  # with the number of steps that each needs
        (ConstantDiffusion(0.5), grid(250)),
        (BetaDiffusion(), grid(250)),
        (ReverseDiffusion(), CONDOT_SNR),
        (ConstantDiffusion(3.0), grid(400)),
    ],
    ids=["constant 0.5, 250 steps", "beta, 250 steps", "reverse, 200 steps", "constant 3, 400 steps"],
)
def test_sde_ends_in_the_mixture(diffusion: Diffusion, times: Tensor) -> None:
    oracle, x = mixture(), sample_sde(CondOTPath(), diffusion, times)
    n = len(x)
    directions = torch.tensor([[math.cos(a), math.sin(a)] for a in (0.0, math.pi / 4, math.pi / 2)]).double()
    assert all(projected_pvalue(x, oracle, direction) > 1e-3 for direction in directions)
    deviations = x - oracle.weights @ oracle.means
    covariance = 0.35**2 * torch.eye(2) + torch.cov(oracle.means.T, correction=0, aweights=oracle.weights)
    products = deviations[:, :, None] * deviations[:, None, :]
    assert (deviations.mean(0).abs() < 3 * deviations.std(0) / n**0.5).all()
    assert ((products.mean(0) - covariance).abs() < 3 * products.std(0) / n**0.5).all()
    draws = [oracle.sample(n, generator(seed)) for seed in range(10, 19)]
    exact = torch.tensor([sliced_wasserstein(draws[0], draw, directions.T) for draw in draws[1:]])
    assert sliced_wasserstein(draws[0], x, directions.T) < exact.mean() + 3 * exact.std()


def test_sigma_three_needs_more_than_a_hundred_steps() -> None:
    x = sample_sde(CondOTPath(), ConstantDiffusion(3.0), grid(100))
    assert projected_pvalue(x, mixture(), torch.tensor([1.0, 0.0]).double()) < 1e-3


def test_noise_is_owned_by_samples_not_by_batches() -> None:
    xi, x0 = normal(10, 6, 3), normal(6, 3, seed=1)
    drift, diffusion = ornstein_uhlenbeck(1.0, 0.5)
    for solver in BOTH:
        whole = solver(drift, diffusion, x0, grid(10), noise=lambda i, like: xi[i])
        part = solver(drift, diffusion, x0[4:], grid(10), noise=lambda i, like: xi[i, 4:])
        assert torch.equal(whole[4:], part)


@pytest.mark.parametrize("solver", BOTH)
def test_generator_shapes_dtypes_and_trajectories(solver) -> None:
    x0 = normal(2, 3, 4, 4).float()

    def run(seed: int, trajectory: bool = False) -> Tensor:
        return solver(*ornstein_uhlenbeck(1.0, 0.5), x0, grid(5), generator=generator(seed), trajectory=trajectory)

    states = run(0, trajectory=True)
    assert states.shape == (6, 2, 3, 4, 4)
    assert states.dtype == torch.float32
    assert torch.equal(states[0], x0)
    assert torch.equal(states[-1], run(0))
    assert not torch.equal(run(0), run(1))
    for number in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        x = solver(lambda x, t: -x, lambda x, t, number=number: number, x0, grid(5), generator=generator(0))
        torch.testing.assert_close(x, run(0))


@pytest.mark.parametrize("solver", BOTH)
def test_bad_input(solver) -> None:
    x0, (drift, diffusion) = normal(3, 3), ornstein_uhlenbeck(1.0, 1.0)
    with pytest.raises(ValueError, match="either noise or generator, not both"):
        solver(drift, diffusion, x0, grid(2), noise=lambda i, like: like, generator=generator())
    with pytest.raises(ValueError, match=r"noise\(0, x\) must have the shape \(3, 3\) of x, got \(3,\)"):
        solver(drift, diffusion, x0, grid(2), noise=lambda i, like: like[0])
    for shape in [(3,), (1, 4), (1, 3, 3)]:
        with pytest.raises(ValueError, match=r"diffusion must .* x of shape \(3, 3\).*expand_time"):
            solver(drift, lambda x, t, shape=shape: torch.ones(shape), x0, grid(2))
    with pytest.raises(ValueError, match=r"must return shape \(3, 3\) like x, got \(3,\)"):
        solver(lambda x, t: t, diffusion, x0, grid(2))
    with pytest.raises(ValueError, match="times must be finite and increase strictly, got 1 then 0"):
        solver(drift, diffusion, x0, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"NaN or infinite values appear in step 1 of 2, from t = 0 to 0\.5"):
        solver(drift, lambda x, t: expand_time(1 / t, x), x0, grid(2))
