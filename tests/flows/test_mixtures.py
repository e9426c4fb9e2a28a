import math

import numpy as np
import pytest
import torch
from scipy import stats

from fmlit.flows import mixtures
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, CosinePath, PolynomialPath, VPPath
from fmlit.solvers.likelihood import velocity_and_divergence

PATHS = [CondOTPath(), CosinePath(), PolynomialPath(2.0), VPPath()]
SHAPES = [(5,), (3, 4, 4), (2, 4, 4, 3), (7, 3)]
each_path = pytest.mark.parametrize("path", PATHS, ids=repr)
FIELDS = ["velocity", "score", "data"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture_of(shape, stds=(0.0, 0.1, 0.5, 1.5), dtype=torch.float64):
    g = generator()
    means = 2 * torch.randn(len(stds), *shape, dtype=dtype, generator=g) + 0.5
    return GaussianMixture(means, torch.tensor(stds), torch.rand(len(stds), generator=g) + 0.1)


def on_the_path(mixture, path, n=4, low=0.05, high=0.95, seed=1):
    """Points x_t of the mixture and their times."""
    g = generator(seed)
    z = mixture.sample(n, generator=g)
    t = low + (high - low) * torch.rand(n, dtype=z.dtype, generator=g)
    return path.sample(z, torch.randn(z.shape, dtype=z.dtype, generator=g), t), t


def log_prob_and_score(mixture, x, path, t):
    x = x.clone().requires_grad_()
    log_prob = mixture.log_prob(x, path, t)
    return log_prob.detach(), torch.autograd.grad(log_prob.sum(), x)[0]


@each_path
@pytest.mark.parametrize("shape", SHAPES)
def test_log_prob_is_that_of_the_explicit_mixture(path, shape):
    mixture = mixture_of(shape)
    x, t = on_the_path(mixture, path)
    for i in range(len(x)):
        alpha, beta = path.alpha(t[[i]]), path.beta(t[[i]])
        terms = [
            math.log(w) + torch.distributions.Normal(alpha * m, (alpha**2 * s**2 + beta**2).sqrt()).log_prob(x[i]).sum()
            for m, s, w in zip(mixture.means, mixture.stds, mixture.weights, strict=True)
        ]
        expected = torch.stack(terms).logsumexp(0)
        torch.testing.assert_close(mixture.log_prob(x, path, t)[i], expected, rtol=1e-12, atol=1e-10)


@each_path
@pytest.mark.parametrize("shape", SHAPES)
def test_fields_agree_with_autograd_of_the_log_density(path, shape):
    mixture = mixture_of(shape)
    x, t = on_the_path(mixture, path)
    _, score = log_prob_and_score(mixture, x, path, t)
    column = (-1, *(1,) * len(shape))
    alpha, beta, alpha_dot, beta_dot = (
        f(t).reshape(column) for f in (path.alpha, path.beta, path.alpha_dot, path.beta_dot)
    )
    data = (x + beta**2 * score) / alpha  # Tweedie's formula
    velocity = alpha_dot * data - beta_dot * beta * score
    torch.testing.assert_close(mixture.score(x, path, t), score, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixture.data(x, path, t), data, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixture.velocity(x, path, t), velocity, rtol=0, atol=1e-6)


@each_path
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2, 2)])
def test_velocity_satisfies_the_continuity_equation(path, shape):
    """d log p / dt + div u + u . grad log p = 0, the time derivative by a fourth-order difference."""
    mixture = mixture_of(shape, stds=(0.2, 0.5, 1.5))
    x, t = on_the_path(mixture, path, n=16)
    h = 1e-4
    p = [mixture.log_prob(x, path, t + k * h) for k in (-2, -1, 1, 2)]
    rate = (p[0] - 8 * p[1] + 8 * p[2] - p[3]) / (12 * h)
    _, score = log_prob_and_score(mixture, x, path, t)
    velocity, divergence = velocity_and_divergence(lambda x, t: mixture.velocity(x, path, t), x, t)
    residual = rate + divergence + (velocity * score).flatten(1).sum(1)
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-6)


def test_two_point_toy_in_one_line():
    toy = GaussianMixture([[-2.0], [2.0]], 0.0)
    path, t = CondOTPath(), torch.full((3,), 0.5, dtype=torch.float64)
    x = torch.tensor([[-1.0], [0.0], [0.7]], dtype=torch.float64)
    data = 2 * torch.tanh(0.5 * 2 * x / 0.25)  # posterior odds exp(2 alpha m x / beta^2)
    torch.testing.assert_close(toy.data(x, path, t), data, rtol=0, atol=1e-12)
    torch.testing.assert_close(toy.velocity(x, path, t), (data - x) / 0.5, rtol=0, atol=1e-12)
    assert set(toy.sample(100, generator()).flatten().tolist()) == {-2.0, 2.0}


@each_path
def test_ends_of_the_clock(path):
    """At t = 1 the mixture itself, with finite limits even where beta_dot diverges; at t = 0 the noise."""
    mixture = mixture_of((3,), stds=(0.3, 1.0))
    one = torch.ones(5, dtype=torch.float64)
    x = mixture.sample(5, generator())
    near = one - 1e-9
    for name in FIELDS:
        field = getattr(mixture, name)
        assert torch.isfinite(field(x, path, one)).all()
        torch.testing.assert_close(field(x, path, one), field(x, path, near), rtol=0, atol=1e-6)
    torch.testing.assert_close(mixture.data(x, path, one), x, rtol=0, atol=1e-12)
    zero = torch.zeros_like(one)
    if path.alpha(zero)[0] == 0:
        torch.testing.assert_close(mixture.score(x, path, zero), -x, rtol=0, atol=1e-12)
        mean = (mixture.weights @ mixture.means).expand(5, 3)
        torch.testing.assert_close(mixture.data(x, path, zero), mean, rtol=0, atol=1e-12)


@each_path
def test_diracs_are_the_limit_of_narrow_gaussians(path):
    means = torch.randn(6, 3, dtype=torch.float64, generator=generator())
    diracs, narrow = GaussianMixture(means, 0.0), GaussianMixture(means, 1e-7)
    x, t = on_the_path(diracs, path, high=0.99)
    for name in ["log_prob", *FIELDS]:
        limit, value = getattr(narrow, name)(x, path, t), getattr(diracs, name)(x, path, t)
        torch.testing.assert_close(value, limit, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["log_prob", *FIELDS])
def test_diracs_have_no_density_at_time_one(method):
    with pytest.raises(ValueError, match="zero standard deviation has no density at t = 1"):
        getattr(mixture_of((2,)), method)(torch.zeros(2, 2), CondOTPath(), torch.tensor([0.5, 1.0]))


@each_path
def test_matrix_products_in_blocks_agree_with_differences(path, monkeypatch):
    mixture = mixture_of((3, 4, 4))
    x, t = on_the_path(mixture, path, n=11)
    x = x.requires_grad_()
    expected = {name: getattr(mixture, name)(x, path, t) for name in ["log_prob", *FIELDS]}
    monkeypatch.setattr(mixtures, "ELEMENTS", 12)  # three samples of four components at a time
    for name, value in expected.items():
        in_blocks = getattr(mixture, name)(x, path, t)
        torch.testing.assert_close(in_blocks, value, rtol=1e-9, atol=1e-9)
        gradients = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (in_blocks, value)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [1.0, 1e4, 1e8])
def test_ten_thousand_diracs_stay_finite_and_exact_far_away(dtype, distance):
    """Far out one component holds all the mass, and the fields are those of that component alone."""
    means = torch.randn(10_000, 64, dtype=dtype, generator=generator())
    mixture, path = GaussianMixture(means, 0.0), CondOTPath()
    t = torch.tensor([0.01, 0.5, 0.999], dtype=dtype)
    x = means[:3] * t[:, None] + distance * torch.nn.functional.normalize(means[:3], dim=1)
    values = {name: getattr(mixture, name)(x, path, t) for name in ["log_prob", *FIELDS]}
    for value in values.values():
        assert torch.isfinite(value).all()
        assert value.dtype == dtype
    if distance > 1:
        nearest = means[(x.double() @ means.double().T - t[:, None] * means.double().square().sum(1) / 2).argmax(1)]
        torch.testing.assert_close(values["data"][1:], nearest[1:], rtol=0, atol=1e-6)
        relative = (values["velocity"] - path.conditional_velocity(x, nearest, t))[1:].norm() / values[
            "velocity"
        ].norm()
        assert relative < 1e-5


def test_an_offset_of_the_data_costs_no_digits():
    mixture = mixture_of((4,), stds=(0.1, 0.3, 0.0))
    moved = GaussianMixture(mixture.means + 1e3, mixture.stds, mixture.weights)
    path, t = CondOTPath(), torch.full((5,), 0.9, dtype=torch.float64)
    x = mixture.sample(5, generator())
    shifted = x + 0.9e3
    torch.testing.assert_close(moved.score(shifted, path, t), mixture.score(x, path, t), rtol=0, atol=1e-8)
    velocity = mixture.velocity(x, path, t) + 1e3
    torch.testing.assert_close(moved.velocity(shifted, path, t), velocity, rtol=0, atol=1e-8)


def test_single_precision_is_double_precision_rounded():
    mixture = mixture_of((3,), dtype=torch.float32)
    x, t = on_the_path(mixture, VPPath(), high=0.999)
    assert x.dtype == torch.float32
    for name in ["log_prob", *FIELDS]:
        method = getattr(mixture, name)
        assert torch.equal(method(x, VPPath(), t), method(x.double(), VPPath(), t.double()).float())


def test_samples_follow_the_mixture():
    mixture = GaussianMixture([[-1.0], [0.5], [3.0]], [0.2, 1.0, 0.0], [1, 2, 1])
    samples = mixture.sample(20_000, generator())
    assert samples.shape == (20_000, 1)
    values = samples.numpy().ravel().astype(np.float64)
    assert stats.binomtest(int((values == 3).sum()), 20_000, 0.25).pvalue > 1e-3
    smooth = values[values != 3]

    def distribution(x):
        return (stats.norm.cdf(x, -1, 0.2) + 2 * stats.norm.cdf(x, 0.5, 1)) / 3

    assert stats.kstest(smooth, distribution).pvalue > 1e-3


def test_samples_repeat_with_the_generator_and_keep_shape_and_type():
    mixture = mixture_of((2, 4, 4, 3), dtype=torch.float32)
    first, again = mixture.sample(7, generator(3)), mixture.sample(7, generator(3))
    assert first.shape == (7, 2, 4, 4, 3)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, mixture.sample(7, generator(4)))


def test_an_empty_batch_gives_empty_fields():
    mixture, none = mixture_of((3, 4)), torch.empty(0, 3, 4)
    assert mixture.velocity(none, CondOTPath(), torch.empty(0)).shape == (0, 3, 4)
    assert mixture.log_prob(none, CondOTPath(), torch.empty(0)).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], 0.1), r"means must have shape \(K, \*shape\) with K >= 1, got \(2,\)"),
        ((torch.empty(0, 2), 0.1), r"got \(0, 2\)"),
        (([[1.0], [2.0]], [0.1, 0.1, 0.1]), r"stds must have shape \(2,\), one for each mean, got \(3,\)"),
        (([[1.0], [2.0]], -0.1), r"stds must be finite and at least 0, got \[-0\.1"),
        (([[1.0], [2.0]], float("nan")), "stds must be finite"),
        (([[1.0], [2.0]], 0.1, [0.5]), r"weights must have shape \(2,\)"),
        (([[1.0], [2.0]], 0.1, [1.0, -0.5]), r"weights must be finite and at least 0, got \[1\.0, -0\.5\]"),
        (([[1.0], [2.0]], 0.1, [0.0, 0.0]), "weights must not all be 0"),
        (([[1.0], [float("inf")]], 0.1), "means hold NaN or infinite values"),
    ],
)
def test_bad_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4), r"x must have shape \(B, 4, 4\), got \(4, 3\)"),
        (torch.zeros(4, 4, 4), torch.tensor(0.5), r"t must have shape \(4,\)"),
        (torch.zeros(2, 4, 4), torch.tensor([0.5, 1.5]), r"t must lie in \[0, 1\]"),
    ],
)
def test_bad_points_and_times_are_named(x, t, message):
    with pytest.raises(ValueError, match=message):
        mixture_of((4, 4)).velocity(x, CondOTPath(), t)


def small_model(parameters, x, t):
    """u(x, t) = A tanh(B x + c t) + d for one x (1,) and t (): 10 parameters."""
    a, b, c, d = parameters.split([3, 3, 3, 1])
    return a @ torch.tanh(b * x + c * t) + d


def regression(path, n=40_000):
    """Draws of conditional flow matching with the target of each loss: x, t, marginal and conditional velocity."""
    mixture, g = GaussianMixture([[-2.0], [0.5], [2.0]], [0.3, 0.5, 0.2], [1, 1, 2]), generator(5)
    z = mixture.sample(n, g).double()
    eps = torch.randn(n, 1, dtype=torch.float64, generator=g)
    t = 1e-3 + (1 - 2e-3) * torch.rand(n, dtype=torch.float64, generator=g)
    x = path.sample(z, eps, t)
    return x, t, mixture.velocity(x, path, t), path.velocity(z, eps, t)


def in_standard_errors(samples):
    """Mean over the first dimension, in units of its own standard error."""
    return samples.mean(0) * len(samples) ** 0.5 / samples.std(0)


@each_path
def test_theorem_1_both_losses_have_one_gradient(path):
    """Flow matching (marginal target) and conditional flow matching, by 40,000 paired draws."""
    x, t, marginal, conditional = regression(path)
    parameters = torch.randn(10, dtype=torch.float64, generator=generator(6))

    def gradients(target):
        def loss(parameters, x, t, target):
            return (small_model(parameters, x, t) - target).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, x, t, target)

    difference = gradients(marginal) - gradients(conditional)
    assert in_standard_errors(difference).abs().max() < 3
    wrong = gradients(0.9 * marginal) - gradients(conditional)  # the same test sees a field that is 10 % off
    assert in_standard_errors(wrong).abs().max() > 6


@each_path
def test_theorem_1_the_losses_differ_by_a_constant(path):
    """It is E|conditional - marginal|^2, whatever the parameters."""
    x, t, marginal, conditional = regression(path)
    constant = (conditional - marginal).square().sum(1)
    for seed in range(3):
        parameters = torch.randn(10, dtype=torch.float64, generator=generator(seed))
        output = torch.func.vmap(small_model, (None, 0, 0))(parameters, x, t)
        excess = (output - conditional).square().sum(1) - (output - marginal).square().sum(1)
        assert in_standard_errors(excess - constant).abs() < 3
        assert in_standard_errors(excess) > 6
