import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from fmlit import solvers
from fmlit.core.tensors import expand_time
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, CosinePath, GaussianPath, PolynomialPath, VPPath
from fmlit.flows.predictions import Velocity
from fmlit.sampling.grids import EDMGrid, LogitSNRGrid
from fmlit.solvers.records import SOLVERS

PATHS = [CondOTPath(), CosinePath(), PolynomialPath(2.0), VPPath()]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64)
    return GaussianMixture(means, 0.35, [0.4, 0.6])


@pytest.mark.parametrize("path", PATHS)
def test_churn_is_algorithm_2_of_edm(path: GaussianPath) -> None:
    # Data N(0, 0.5^2): the ideal denoiser is y / (1 + 4 sigma^2), and the algorithm can be written down in y and sigma.
    variance, s_churn, s_min, s_max, s_noise = 0.25, 4.0, 0.05, 30.0, 1.01
    times = torch.cat([EDMGrid(sigma_max=60.0).times(path, 9), torch.ones(1).double()])
    xi, sigmas = normal(9, 5, 2), path.sigma(times)

    def field(x: Tensor, t: Tensor) -> Tensor:
        alpha, beta = path.alpha(t), path.beta(t)
        slope = (alpha * path.alpha_dot(t) * variance + path.variance_dot(t) / 2) / (alpha**2 * variance + beta**2)
        return expand_time(slope, x) * x

    def slope(y: Tensor, sigma: Tensor) -> Tensor:
        return (y - y * variance / (variance + sigma**2)) / sigma

    y = sigmas[0] * normal(5, 2, seed=1)
    for i, sigma in enumerate(sigmas[:-1]):
        gamma = min(s_churn / 9, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
        raised = sigma * (1 + gamma)
        hat = y + (raised**2 - sigma**2).sqrt() * s_noise * xi[i]
        d = slope(hat, raised)
        y = hat + (sigmas[i + 1] - raised) * d
        if sigmas[i + 1] > 0:
            y = hat + (sigmas[i + 1] - raised) * (d + slope(y, sigmas[i + 1])) / 2
    x0 = path.beta(times[0]) * normal(5, 2, seed=1)
    options = {"s_churn": s_churn, "s_min": s_min, "s_max": s_max, "s_noise": s_noise}
    x = solvers.churn(field, x0, times, path, lambda i, like: xi[i], **options)
    torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


def test_churn_is_spread_over_all_steps_that_the_sampler_counts() -> None:
    # A field of 0 keeps x on CondOT, and with it 1 - t: what a step adds is seen in the noise that it asks for.
    path, times, asked = CondOTPath(), EDMGrid().times(CondOTPath(), 8), []

    def noise(i: int, like: Tensor) -> Tensor:
        asked.append(i)
        return torch.zeros_like(like)

    def seen(x: Tensor, t: Tensor) -> Tensor:
        evaluated.append(t[0].item())
        return torch.zeros_like(x)

    for steps, counted in ((None, 7), (8, 8)):
        evaluated: list[float] = []
        solvers.churn(seen, normal(1, 2), times, path, s_churn=2.0, s_max=1e9, noise=noise, steps=steps)
        raised = path.sigma(torch.tensor(evaluated[2], dtype=torch.float64)).item()  # two evaluations per step
        assert raised / path.sigma(times[1]).item() == pytest.approx(1 + 2.0 / counted)


def test_churn_without_noise_is_heun_in_sigma() -> None:
    path = CosinePath()
    times = EDMGrid().times(path, 12)
    oracle, x0 = mixture(), path.beta(times[0]) * normal(4, 2)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return oracle.velocity(x, path, t)

    def backwards(y: Tensor, s: Tensor) -> Tensor:  # dy/ds = -eps, with s = -sigma
        t = path.time_of_sigma(-s)
        x = expand_time(path.alpha(t), y) * y
        return -Velocity().noise(path, velocity(x, t), x, t)

    sigmas = path.sigma(times)
    expected = path.alpha(times[-1]) * solvers.heun(backwards, x0 / path.alpha(times[0]), -sigmas)
    assert torch.allclose(solvers.churn(velocity, x0, times, path, s_churn=0.0), expected, rtol=1e-9, atol=1e-9)


def test_churn_ends_in_the_mixture() -> None:
    # 60 steps; with fewer, the Heun steps are too coarse for so much noise
    path, oracle, n = CondOTPath(), mixture(), 20_000
    times = torch.cat([EDMGrid().times(path, 60), torch.ones(1).double()])
    x = solvers.churn(
        lambda x, t: oracle.velocity(x, path, t),
        path.beta(times[0]) * normal(n, 2),
        times,
        path,
        s_churn=10.0,
        s_noise=1.0,
        generator=torch.Generator().manual_seed(1),
    )
    for axis in range(2):

        def cdf(values, axis: int = axis):
            parts = zip(oracle.weights.tolist(), oracle.means[:, axis].tolist(), oracle.stds.tolist(), strict=True)
            return sum(w * stats.norm.cdf(values, m, s) for w, m, s in parts)

        assert stats.kstest(x[:, axis].numpy(), cdf).pvalue > 1e-3


def test_churn_stays_below_the_first_noise_level_of_the_path() -> None:
    path = VPPath(rate_max=10.0)  # sigma(0) = 12.5
    oracle, seen = mixture(), []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append((t[0].item(), x))
        return oracle.velocity(x, path, t)

    times, xi = EDMGrid(sigma_max=12.0).times(path, 6), normal(4, 2, seed=1)
    x0 = path.beta(times[0]) * normal(4, 2)
    solvers.churn(field, x0, times, path, s_churn=100.0, s_noise=1.0, noise=lambda i, like: xi)
    first, x = seen[0]
    alpha, sigma = path.alpha(torch.zeros(1).double()), path.sigma(torch.zeros(1).double())
    assert first == 0.0
    raised = x0 / path.alpha(times[0]) + (sigma**2 - path.sigma(times[0]) ** 2).sqrt() * xi
    torch.testing.assert_close(x, alpha * raised, rtol=1e-9, atol=1e-9)


def test_order_without_added_noise() -> None:
    path, oracle, steps = CosinePath(), mixture(), [64, 128, 256]

    def field(x: Tensor, t: Tensor) -> Tensor:
        return oracle.velocity(x, path, t)

    grids = {n: LogitSNRGrid(0.002, 80.0).times(path, n + 1) for n in [*steps, 768]}
    x0 = path.beta(grids[64][0]) * normal(8, 2)
    reference = solvers.rk4(field, x0, grids[768])
    errors = [(solvers.churn(field, x0, grids[n], path, s_churn=0.0) - reference).norm().item() for n in steps]
    slope = stats.linregress([math.log(n) for n in steps], [math.log(e) for e in errors]).slope
    assert -slope == pytest.approx(SOLVERS["churn"].order, abs=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s_churn": -1.0}, "s_churn must not be negative, got -1"),
        ({"s_min": -1.0}, "s_min must not be negative, got -1"),
        ({"s_noise": -1.0}, "s_noise must not be negative, got -1"),
        ({"s_min": 2.0, "s_max": 1.0}, "s_min <= s_max, got 2.0 and 1.0"),
    ],
)
def test_bad_churn_options(options: dict, message: str) -> None:
    path = CondOTPath()
    with pytest.raises(ValueError, match=message):
        solvers.churn(lambda x, t: x, normal(2, 2), torch.tensor([0.1, 0.5]), path, **options)
    with pytest.raises(ValueError, match=r"start at t = 0, where alpha = 0"):
        solvers.churn(lambda x, t: x, normal(2, 2), torch.linspace(0, 1, 5), path)
