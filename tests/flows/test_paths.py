import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fmlit.flows.paths import CondOTPath, CosinePath, PolynomialPath, VPPath, check_time

PATHS = [CondOTPath(), CosinePath(), PolynomialPath(1.0), PolynomialPath(2.5), VPPath(), VPPath(0.5, 12.0)]
SHAPES = [(5,), (3, 4, 4), (2, 4, 4, 3), (7, 3)]
examples = settings(max_examples=50)
each_path = pytest.mark.parametrize("path", PATHS, ids=repr)


def draw(shape, n=4, dtype=torch.float64):
    """z, eps and interior times."""
    g = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, n, *shape, dtype=dtype, generator=g).unbind()
    return z, eps, 0.05 + 0.9 * torch.rand(n, dtype=dtype, generator=g)


def derivative(function, t):
    t = t.clone().requires_grad_()
    return torch.autograd.grad(function(t).sum(), t)[0]


paths = st.one_of(
    st.just(CondOTPath()),
    st.just(CosinePath()),
    st.floats(1, 6).map(PolynomialPath),
    st.tuples(st.floats(0.01, 1), st.floats(1, 40)).map(lambda rates: VPPath(*rates)),
)


@examples
@given(paths, st.lists(st.floats(1e-3, 1 - 1e-3), min_size=1, max_size=5))
def test_time_derivatives_agree_with_autograd(path, times):
    t = torch.tensor(times, dtype=torch.float64)
    torch.testing.assert_close(path.alpha_dot(t), derivative(path.alpha, t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(path.beta_dot(t), derivative(path.beta, t), rtol=1e-10, atol=1e-10)
    variance_dot = derivative(lambda t: path.beta(t) ** 2, t)
    torch.testing.assert_close(path.variance_dot(t), variance_dot, rtol=1e-10, atol=1e-10)


@examples
@given(paths, st.floats(1e-3, 100))
def test_time_of_sigma_inverts_sigma(path, sigma):
    sigma = torch.tensor([sigma], dtype=torch.float64)
    t = path.time_of_sigma(sigma)
    reachable = sigma.clamp(max=path.sigma(torch.zeros(1, dtype=torch.float64)))
    torch.testing.assert_close(path.sigma(t), reachable, rtol=1e-9, atol=0)


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_end_points(path, dtype):
    zero, one = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    assert path.alpha(one) == 1
    assert path.beta(one) == 0  # exactly: where it is 0 decides which limits exist
    if isinstance(path, VPPath):
        left = math.exp(-(path.rate_max + path.rate_min) / 4)
        assert path.alpha(zero).item() == pytest.approx(left, rel=1e-5)
        assert path.variance_dot(one).item() == pytest.approx(-path.rate_min, rel=1e-5)
    else:
        assert path.alpha(zero) == 0
        assert path.beta(zero).item() == pytest.approx(1, abs=1e-7)


def test_default_vp_path_keeps_the_stated_data_at_time_zero():
    assert VPPath().alpha(torch.zeros(1)).item() == pytest.approx(0.0066, abs=5e-5)


@pytest.mark.parametrize("path", [CosinePath(), VPPath()], ids=repr)
def test_variance_preserving_paths_preserve_it(path):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.beta(t) ** 2, torch.ones_like(t), rtol=1e-14, atol=0)


@each_path
@pytest.mark.parametrize("shape", SHAPES)
def test_velocity_is_the_time_derivative_of_the_sample(path, shape):
    z, eps, t = draw(shape)
    velocity = torch.func.jvp(lambda t: path.sample(z, eps, t), (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(path.velocity(z, eps, t), velocity, rtol=0, atol=1e-10)


@each_path
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conditional_fields_of_the_sample(path, shape, dtype):
    z, eps, t = draw(shape, dtype=dtype)
    x = path.sample(z, eps, t).requires_grad_()
    tolerance = 1e-10 if dtype == torch.float64 else 2e-3  # beta falls to 0.05 and divides rounding errors
    velocity = path.conditional_velocity(x, z, t)
    torch.testing.assert_close(velocity, path.velocity(z, eps, t), rtol=tolerance, atol=tolerance)
    mean = torch.stack([path.alpha(t[i : i + 1]) * z[i] for i in range(len(z))])
    std = torch.stack([path.beta(t[i : i + 1]) * torch.ones_like(z[i]) for i in range(len(z))])
    (score,) = torch.autograd.grad(torch.distributions.Normal(mean, std).log_prob(x).sum(), x)
    torch.testing.assert_close(path.conditional_score(x, z, t), score, rtol=tolerance, atol=tolerance)
    assert velocity.dtype == dtype


@each_path
def test_samples_are_treated_one_by_one_when_the_batch_equals_the_width(path):
    z, eps, t = draw((3, 4, 4))
    one_by_one = [path.sample(z[[i]], eps[[i]], t[[i]]) for i in range(4)]
    torch.testing.assert_close(path.sample(z, eps, t), torch.cat(one_by_one), rtol=0, atol=1e-15)


@pytest.mark.parametrize("bad", [-1e-6, 1.000001, float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["sample", "velocity", "conditional_velocity", "conditional_score"])
def test_times_off_the_clock_are_refused(method, bad):
    z, eps, t = draw((2,))
    t[2] = bad
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        getattr(CondOTPath(), method)(z, eps, t)


def test_the_refusal_names_the_range_of_the_times():
    with pytest.raises(ValueError, match=r"from 0\.5 to 1\.5"):
        check_time(torch.tensor([0.5, 1.5]))
    check_time(torch.empty(0))


def test_a_scalar_time_is_refused():
    z, eps, _ = draw((2,))
    with pytest.raises(ValueError, match="t must have shape"):
        CondOTPath().sample(z, eps, torch.tensor(0.5))


@pytest.mark.parametrize("power", [0.5, 0.0, -1.0, float("nan")])
def test_polynomial_power_below_one_is_refused(power):
    with pytest.raises(ValueError, match=f"power must be at least 1, got {power}"):
        PolynomialPath(power)


@pytest.mark.parametrize("rates", [(0.0, 20.0), (-0.1, 20.0), (5.0, 1.0)])
def test_vp_rates_out_of_order_are_refused(rates):
    with pytest.raises(ValueError, match=f"got {rates[0]} and {rates[1]}"):
        VPPath(*rates)


@examples
@given(paths)
def test_signal_to_noise_grows_with_time(path):
    sigma = path.sigma(torch.linspace(0, 1, 51, dtype=torch.float64))
    assert (sigma.diff()[1:] < 0).all()
    assert sigma[-1] == 0
