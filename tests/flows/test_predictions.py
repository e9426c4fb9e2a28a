import pytest
import torch
from hypothesis import given, settings, strategies as st

from fmlit.core.tensors import expand_time
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, CosinePath, PolynomialPath, VPPath
from fmlit.flows.predictions import MAX_GAIN, Data, Noise, PreconditionedVelocity, Score, Velocity

PATHS = [CondOTPath(), CosinePath(), PolynomialPath(2.0), VPPath()]
PREDICTIONS = [Velocity(), Noise(), Data(), Score(), PreconditionedVelocity(), PreconditionedVelocity(2.0)]
SHAPES = [(5,), (3, 4, 4), (2, 4, 4, 3), (7, 3)]
each_path = pytest.mark.parametrize("path", PATHS, ids=repr)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)


def draw(shape, n=4, seed=0, low=0.02, high=0.98):
    g = torch.Generator().manual_seed(seed)
    z, eps = torch.randn(2, n, *shape, dtype=torch.float64, generator=g)
    return z, eps, low + (high - low) * torch.rand(n, dtype=torch.float64, generator=g)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@each_path
@each_prediction
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_through_the_hub(path, prediction, shape):
    """B is 4, as are height and width: a time that broadcasts over the wrong axis would not fail, but be wrong."""
    z, eps, t = draw(shape)
    x, target = path.sample(z, eps, t), prediction.target(path, z, eps, t)
    for actual, expected in zip(prediction.data_and_noise(path, target, x, t), (z, eps), strict=True):
        assert_same(actual, expected)


@each_path
@each_prediction
def test_every_field_comes_out_of_every_prediction(path, prediction):
    z, eps, t = draw((3, 4, 4))
    x, output = path.sample(z, eps, t), prediction.target(path, z, eps, t)
    assert_same(prediction.velocity(path, output, x, t), path.velocity(z, eps, t))
    assert_same(prediction.score(path, output, x, t), path.conditional_score(x, z, t))
    assert_same(prediction.data(path, output, x, t), z)
    assert_same(prediction.noise(path, output, x, t), eps)


@settings(max_examples=100)
@given(st.sampled_from(PATHS), st.sampled_from(PREDICTIONS), st.sampled_from(PREDICTIONS), st.integers(0, 10**6))
def test_any_prediction_becomes_any_other_and_comes_back(path, first, second, seed):
    """For outputs that belong to no (z, eps) in particular, as those of a network."""
    x, output, t = draw((3, 4, 4), seed=seed)
    other = second.target(path, *first.data_and_noise(path, output, x, t), t)
    back = first.target(path, *second.data_and_noise(path, other, x, t), t)
    torch.testing.assert_close(back, output, rtol=0, atol=1e-10 * max(1, other.abs().max().item()))


@each_path
@pytest.mark.parametrize("name", ["velocity", "score", "data"])
def test_fields_of_the_mixture_convert_into_each_other(path, name):
    """Conversions are linear, so they hold between conditional means: marginal velocity to marginal score, and back."""
    mixture = GaussianMixture(torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)), 0.3)
    z, eps, t = draw((3, 4, 4), low=0.05, high=0.95)
    x = path.sample(z, eps, t)
    output = getattr(mixture, name)(x, path, t)
    prediction = {"velocity": Velocity(), "score": Score(), "data": Data()}[name]
    for other in ("velocity", "score", "data"):
        expected = getattr(mixture, other)(x, path, t)
        torch.testing.assert_close(getattr(prediction, other)(path, output, x, t), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("prediction", "name"), [(Velocity(), "velocity"), (Noise(), "noise"), (Data(), "data"), (Score(), "score")]
)
@each_path
def test_a_prediction_gives_its_own_field_untouched_even_at_the_ends(path, prediction, name):
    x, output, _ = draw((3,), n=2)
    assert getattr(prediction, name)(path, output, x, torch.tensor([0.0, 1.0], dtype=torch.float64)) is output


@each_path
@pytest.mark.parametrize("std", [0.25, 2.0])
def test_preconditioning_gives_unit_variance_in_and_out(path, std):
    """For Gaussian data of the stated standard deviation x and the target are also uncorrelated."""
    prediction, n = PreconditionedVelocity(std), 40_000
    z, eps, _ = draw((1,), n=n)
    for time in (0.1, 0.5, 0.9):
        t = torch.full((n,), time, dtype=torch.float64)
        x = prediction.network_input(path, path.sample(std * z, eps, t), t).squeeze(1)
        target = prediction.target(path, std * z, eps, t).squeeze(1)
        covariance = torch.cov(torch.stack([x, target]))
        torch.testing.assert_close(covariance, torch.eye(2, dtype=torch.float64), rtol=0, atol=0.03)


@each_path
@each_prediction
def test_gains_are_the_derivatives_of_velocity_and_noise(path, prediction):
    z, eps, t = draw((6,))
    x, output = path.sample(z, eps, t), torch.randn_like(z)
    gains = prediction.gains(path, t)
    for field, gain in ((prediction.velocity, gains.velocity), (prediction.noise, gains.noise)):
        change = field(path, output + 1, x, t) - field(path, output, x, t)
        assert_same(change.abs(), expand_time(gain, x).expand_as(x))


def imperfect(path, prediction):
    """Draws, and the output of a network that misses its target, with its squared errors."""
    z, eps, t = draw((6,), n=64)
    target = prediction.target(path, z, eps, t)
    output = target + 0.1 * torch.randn_like(target)
    return z, eps, t, path.sample(z, eps, t), output, (output - target).square()


@each_path
@each_prediction
def test_weights_are_those_of_the_two_losses_up_to_a_bound(path, prediction):
    z, eps, t, x, output, errors = imperfect(path, prediction)
    velocity = (prediction.velocity(path, output, x, t) - path.velocity(z, eps, t)).square()
    noise = (prediction.noise(path, output, x, t) - eps).square()

    def assert_bounded(weight, gain, loss):
        inside = gain <= MAX_GAIN
        assert inside.sum() >= 16
        assert_same((weight[:, None] * errors)[inside], loss[inside])
        assert (weight[~inside] == MAX_GAIN**2).all()

    gains = prediction.gains(path, t)
    if not isinstance(prediction, PreconditionedVelocity):  # EDM's: 1
        assert_bounded(prediction.flow_matching_weight(path, t), gains.velocity, velocity)
    assert_bounded(prediction.score_matching_weight(path, t), gains.noise, noise)
    ends = torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64)
    for weight in (prediction.flow_matching_weight(path, ends), prediction.score_matching_weight(path, ends)):
        assert (weight <= MAX_GAIN**2).all()


@each_path
@each_prediction
def test_the_unweighted_score_matching_loss_is_the_square_of_the_scores_error(path, prediction):
    _, eps, t, x, output, errors = imperfect(path, prediction)
    weight = prediction.score_matching_weight(path, t, weighted=False)
    error = prediction.score(path, output, x, t) + eps / path.beta(t)[:, None]
    assert_same(weight[:, None] * errors, error.square())


@each_path
def test_preconditioning_is_that_of_edm(path):
    """D(y; sigma) = c_skip y + c_out F(c_in y), y = x / alpha, sigma = beta / alpha (Karras et al. 2022, table 1)."""
    std, prediction = 0.5, PreconditionedVelocity(0.5)
    x, output, t = draw((6,))
    y, sigma = x / path.alpha(t)[:, None], path.sigma(t)[:, None]
    variance = sigma**2 + std**2
    denoised = std**2 / variance * y + sigma * std / variance.sqrt() * output
    assert_same(prediction.data(path, output, x, t), denoised)
    assert_same(prediction.network_input(path, x, t), y / variance.sqrt())


@pytest.mark.parametrize("std", [0.0, -0.5, float("nan")])
def test_data_std_must_be_positive(std):
    with pytest.raises(ValueError, match=f"data_std must be positive, got {std}"):
        PreconditionedVelocity(std)
