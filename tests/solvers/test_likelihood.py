import math
from functools import partial

import pytest
import torch
from scipy import stats

from fmlit import solvers
from fmlit.core.tensors import from_uint8
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, CosinePath, PolynomialPath, VPPath
from fmlit.flows.times import sigma_limits
from fmlit.sampling.grids import EDMGrid
from fmlit.solvers.likelihood import LEVEL, bits_per_dimension, dequantize, log_likelihood, velocity_and_divergence

PATHS = [CondOTPath(), CosinePath(), PolynomialPath(2.0)]
TIMES = torch.linspace(0, 1, 51, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture_of(shape, dtype=torch.float64):
    means = torch.randn(3, *shape, dtype=dtype, generator=generator())
    return GaussianMixture(means, [0.4, 0.7, 1.2], [1, 2, 3])


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2, 2), (3, 2)])
def test_exact_trace_gives_the_density_of_the_mixture(path, shape):
    mixture = mixture_of(shape)
    z = mixture.sample(4, generator(1))
    log_prob = log_likelihood(lambda x, t: mixture.velocity(x, path, t), z, TIMES)
    exact = mixture.log_prob(z, path, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(log_prob, exact, rtol=0, atol=1e-3)
    assert not log_prob.requires_grad


@pytest.mark.parametrize(
    "solver", [solvers.heun, partial(solvers.dopri5, rtol=1e-6, atol=1e-6)], ids=["heun", "dopri5"]
)
def test_any_ode_solver_serves(solver):
    mixture, path = mixture_of((2,)), CondOTPath()
    z = mixture.sample(4, generator(1))
    log_prob = log_likelihood(lambda x, t: mixture.velocity(x, path, t), z, torch.linspace(0, 1, 101), solver=solver)
    exact = mixture.log_prob(z, path, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(log_prob, exact, rtol=0, atol=1e-3)


def test_single_precision():
    mixture, path = mixture_of((3,), torch.float32), CondOTPath()
    z = mixture.sample(4, generator(1))
    log_prob = log_likelihood(lambda x, t: mixture.velocity(x, path, t), z, TIMES)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, mixture.log_prob(z, path, torch.ones(4)), rtol=0, atol=1e-3)


def test_a_linear_flow_has_its_closed_form():
    """dx = A x dt from t = 0.25 to 0.75: x0 = exp(-A / 2) z, and the volume grows by exp(tr(A) / 2)."""
    matrix = torch.tensor([[0.3, -2.0], [1.0, -0.8]], dtype=torch.float64)
    z = torch.randn(5, 2, dtype=torch.float64, generator=generator())
    times = torch.linspace(0.25, 0.75, 21, dtype=torch.float64)
    x0 = z @ torch.linalg.matrix_exp(-matrix / 2).T
    expected = torch.distributions.Normal(0, 1).log_prob(x0).sum(1) - matrix.trace() / 2
    log_prob = log_likelihood(lambda x, t: x @ matrix.T, z, times)
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", [VPPath(), *PATHS], ids=repr)
def test_the_prior_of_a_flow_that_starts_late_is_the_noise_of_samplers(path):
    """What is left at sigma 80 of data of mean zero: of scale beta, the prior lacks only the data's share."""
    mixture, limits = GaussianMixture([[-0.6, 0.3], [0.3, -0.15]], [0.2, 0.3], [1, 2]), sigma_limits(path)
    end = torch.full((64,), limits.end, dtype=torch.float64)
    z = mixture.sample(64, generator(1)).double()
    x = path.sample(z, torch.randn(64, 2, dtype=torch.float64, generator=generator()), end)
    times = EDMGrid().times(path, 100, limits)
    exact = mixture.log_prob(x, path, end)
    ours, standard = (
        log_likelihood(lambda x, t: mixture.velocity(x, path, t), x, times, path=prior) - exact
        for prior in (path, None)
    )
    assert ours.abs().mean() < 0.5 * standard.abs().mean()
    assert ours.abs().mean() < 5e-5


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_from_the_first_time_of_the_clock_the_path_changes_nothing(path):
    mixture = mixture_of((3,))
    z = mixture.sample(4, generator(1))
    given, left_out = (
        log_likelihood(lambda x, t: mixture.velocity(x, path, t), z, TIMES, path=prior) for prior in (path, None)
    )
    assert torch.equal(given, left_out)


def test_times_of_the_field_run_back_over_the_clock_and_never_leave_it():
    seen = []

    def field(x, t):
        seen.append(t)
        return x

    log_likelihood(field, torch.zeros(2, 1), torch.tensor([0.1, 0.4, 0.7]))
    clock = torch.stack(seen)
    assert (clock[:, 0] == clock[:, 1]).all()
    assert clock[0, 0].item() == pytest.approx(0.7)
    assert clock[-1, 0].item() == pytest.approx(0.1)
    assert clock.min() >= torch.tensor(0.1)
    assert clock.max() <= torch.tensor(0.7)


def test_divergence_is_the_trace_of_the_jacobian():
    def field(x, t):
        flat = x.flatten(1)
        return (flat.sin() * flat.roll(1, dims=1) * t[:, None]).reshape(x.shape)

    x = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=generator())
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    velocity, divergence = velocity_and_divergence(field, x, t)
    torch.testing.assert_close(velocity, field(x, t))
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda y, i=i: field(y[None], t[[i]])[0], x[i]).reshape(18, 18)
        torch.testing.assert_close(divergence[i], jacobian.trace())


def test_hutchinson_is_unbiased():
    mixture, path = mixture_of((3,)), CondOTPath()
    z = mixture.sample(1, generator(1)).expand(4000, 3)
    times = torch.linspace(0, 1, 11, dtype=torch.float64)

    def field(x, t):
        return mixture.velocity(x, path, t)

    exact = log_likelihood(field, z[:1], times)
    estimates = log_likelihood(field, z, times, "hutchinson", generator=generator())
    assert estimates.std() > 1e-3  # the probes differ between samples
    assert (estimates.mean() - exact).abs() < 3 * estimates.std() / math.sqrt(4000)


def test_hutchinson_is_exact_for_a_diagonal_jacobian_and_repeats_with_its_generator():
    rates = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    z = torch.randn(64, 3, dtype=torch.float64, generator=generator())

    def rotating(x, t):
        return x * rates + x.roll(1, dims=1)

    exact = log_likelihood(lambda x, t: x * rates, z, TIMES)
    estimate = log_likelihood(lambda x, t: x * rates, z, TIMES, "hutchinson", generator=generator())
    torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-10)
    first, again, other = (log_likelihood(rotating, z, TIMES, "hutchinson", generator=generator(k)) for k in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_inference_mode_and_no_grad_give_the_same(divergence):
    network = torch.nn.Linear(2, 2)
    times = torch.linspace(0, 1, 5)
    z = torch.randn(4, 2, generator=generator())

    def field(x, t):
        return network(x) * t[:, None]

    expected = log_likelihood(field, z, times, divergence, generator=generator())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            log_prob = log_likelihood(field, z.clone(), times.clone(), divergence, generator=generator())
        torch.testing.assert_close(log_prob, expected, rtol=0, atol=0)


def test_dequantised_levels_are_uniform_around_their_gray_value():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(100, 1, 16, 16)
    values = dequantize(images, generator())
    offsets = (values - from_uint8(images)).double() / LEVEL + 0.5
    assert stats.kstest(offsets.flatten().numpy(), "uniform").pvalue > 1e-3
    assert values.dtype == torch.float32
    assert torch.equal(values, dequantize(images, generator()))


def test_a_uniform_density_needs_eight_bits():
    log_prob = torch.full((2,), -12 * math.log(256 * LEVEL), dtype=torch.float64)
    eight = torch.full((2,), 8.0, dtype=torch.float64)
    torch.testing.assert_close(bits_per_dimension(log_prob, (3, 2, 2)), eight)


@pytest.mark.parametrize("std", [0.01, 0.2])
def test_bits_per_dimension_bound_those_of_the_gray_levels(std):
    """Against the exact probability of each level under a Gaussian density; tight where it is wide beside a level."""
    law = torch.distributions.Normal(torch.tensor(0.1, dtype=torch.float64), std)
    n = 4000
    values = torch.stack([law.icdf((torch.arange(n, dtype=torch.float64) + 0.5) / n)])
    images = ((values + 1) / LEVEL).round().clamp(0, 255).to(torch.uint8).reshape(n, 1, 1, 1)
    level = from_uint8(images).double()
    exact = -(law.cdf(level + LEVEL / 2) - law.cdf(level - LEVEL / 2)).log2().mean()
    log_prob = torch.stack([law.log_prob(dequantize(images, generator(k)).double()) for k in range(20)]).flatten()
    bound = bits_per_dimension(log_prob, (1, 1, 1)).mean()
    assert bound > exact - 1e-3
    assert bound < exact + (1e-3 if std > 0.1 else 0.1)


def test_a_field_without_a_gradient_is_refused():
    with pytest.raises(ValueError, match="does not depend on x differentiably"):
        log_likelihood(lambda x, t: x.detach(), torch.zeros(2, 1), TIMES)
    constant = torch.ones(1, requires_grad=True)  # a gradient, but not of x
    for divergence in ("exact", "hutchinson"):
        with pytest.raises(ValueError, match="does not depend on x differentiably"):
            log_likelihood(lambda x, t: constant.expand_as(x), torch.zeros(2, 1), TIMES, divergence)


def test_an_unknown_divergence_is_named():
    with pytest.raises(ValueError, match="must be 'exact' or 'hutchinson', got 'skilling'"):
        log_likelihood(lambda x, t: x, torch.zeros(2, 1), TIMES, "skilling")  # type: ignore[arg-type]


@pytest.mark.parametrize("times", [[0.0, 0.5, 0.5], [1.0, 0.0], [0.5], [[0.0, 1.0]], [0.0, float("nan")]])
def test_times_that_do_not_increase_are_named(times):
    with pytest.raises(ValueError, match="two increasing numbers, got"):
        log_likelihood(lambda x, t: x, torch.zeros(2, 1), torch.tensor(times))


def test_a_field_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"(?i)nan or infinite"):
        log_likelihood(lambda x, t: x / 0, torch.ones(2, 1), TIMES)
