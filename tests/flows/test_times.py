import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

from fmlit.flows.paths import CondOTPath, CosinePath, PolynomialPath, VPPath
from fmlit.flows.predictions import Data, Noise, PreconditionedVelocity, Score, Velocity
from fmlit.flows.times import (
    SIGMA_MAX,
    SIGMA_MIN,
    Limits,
    LogitNormalTime,
    UniformTime,
    sampling_limits,
    sigma_limits,
    training_limits,
)
from fmlit.sampling.grids import EDMGrid, LogitSNRGrid, UniformGrid

PATHS = [CondOTPath(), CosinePath(), PolynomialPath(2.0), VPPath()]
PREDICTIONS = [Velocity(), Noise(), Data(), Score(), PreconditionedVelocity()]
GRIDS = [UniformGrid(), EDMGrid(), LogitSNRGrid()]
each_path = pytest.mark.parametrize("path", PATHS, ids=repr)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Training times


@pytest.mark.parametrize("stratified", [False, True])
def test_laws_have_their_distribution(stratified):
    uniform = UniformTime(stratified).sample(20_000, generator())
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    t = LogitNormalTime(0.5, 1.5, stratified).sample(20_000, generator()).double()
    assert stats.kstest(torch.logit(t).numpy(), "norm", (0.5, 1.5)).pvalue > 1e-3
    assert uniform.dtype == torch.float32


def test_a_single_stratified_draw_follows_the_law_too():
    first = [UniformTime(stratified=True).sample(4, generator(seed))[0].item() for seed in range(3000)]
    assert stats.kstest(first, "uniform").pvalue > 1e-3


def test_logit_normal_times_are_the_noise_levels_of_edm():
    t = LogitNormalTime(mean=1.2, std=1.2).sample(20_000, generator())
    log_sigma = CondOTPath().sigma(t.double()).log()
    assert stats.kstest(log_sigma.numpy(), "norm", (-1.2, 1.2)).pvalue > 1e-3


@settings(max_examples=50)
@given(st.integers(1, 3000), st.integers(0, 10**6))
def test_stratified_draws_fall_one_into_each_stratum(n, seed):
    t = UniformTime(stratified=True).sample(n, generator(seed)).double()
    assert ((t.sort().values - (torch.arange(n) + 0.5) / n).abs() <= 0.5 / n + 1e-7).all()


def test_stratification_lowers_the_variance_of_the_batch_mean_and_keeps_random_order():
    def means(law):
        return torch.stack([law.sample(64, generator(seed)).mean() for seed in range(200)])

    assert means(UniformTime(stratified=True)).var() < means(UniformTime()).var() / 100
    t = UniformTime(stratified=True).sample(64, generator())
    assert not torch.equal(t, t.sort().values)


@pytest.mark.parametrize("law", [UniformTime(), LogitNormalTime(3.0, 4.0, stratified=True)])
def test_times_stay_within_the_limits(law):
    t = law.sample(5000, generator(), Limits(0.1, 0.8))
    assert t.min().item() == pytest.approx(0.1)
    assert t.max().item() == pytest.approx(0.8)


def test_the_logit_normal_quantile_is_finite_at_both_ends_and_monotone():
    for dtype in (torch.float32, torch.float64):
        t = LogitNormalTime().quantile(torch.linspace(0, 1, 101, dtype=dtype))
        assert ((t > 0) & (t < 1)).all()
        assert (t.diff() > 0).all()
        assert t[50].item() == pytest.approx(0.5)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_logit_normal_std_must_be_positive(std):
    with pytest.raises(ValueError, match=f"std must be positive, got {std}"):
        LogitNormalTime(std=std)


# Cut-offs


@each_path
@each_prediction
@pytest.mark.parametrize("stochastic", [False, True])
def test_conversions_are_finite_over_the_sampling_limits(path, prediction, stochastic):
    limits = sampling_limits(path, prediction, stochastic)
    assert 0 <= limits.start < limits.end <= 1
    t = torch.tensor([limits.start, 0.5, limits.end])
    x, output = torch.randn(2, 3, 8, generator=generator())
    assert torch.isfinite(prediction.velocity(path, output, x, t)).all()
    if stochastic:
        assert torch.isfinite(prediction.score(path, output, x, t)).all()


@each_path
@each_prediction
def test_training_targets_are_finite_over_the_training_limits(path, prediction):
    limits = training_limits(path, prediction)
    t = torch.tensor([limits.start, 0.5, limits.end])
    z, eps = torch.randn(2, 3, 8, generator=generator())
    x = path.sample(z, eps, t)
    velocity = prediction.velocity(path, prediction.target(path, z, eps, t), x, t)
    torch.testing.assert_close(velocity, path.velocity(z, eps, t), rtol=1e-3, atol=1e-3)


def test_velocity_networks_use_the_whole_clock_except_on_the_vp_path():
    for prediction in (Velocity(), PreconditionedVelocity()):
        assert training_limits(CondOTPath(), prediction) == sampling_limits(CondOTPath(), prediction) == (0, 1)
        assert training_limits(VPPath(), prediction) == sigma_limits(VPPath())
    assert sampling_limits(VPPath(), Velocity()) == sigma_limits(VPPath())
    assert sampling_limits(CondOTPath(), Noise()) == sigma_limits(CondOTPath())
    assert sampling_limits(CondOTPath(), Velocity(), stochastic=True) == sigma_limits(CondOTPath())


@each_path
@each_prediction
@pytest.mark.parametrize("stochastic", [False, True])
def test_training_covers_every_time_that_sampling_visits(path, prediction, stochastic):
    training = training_limits(path, Score() if stochastic else prediction)
    sampling = sampling_limits(path, prediction, stochastic)
    if training != (0, 1) and sampling == (0, 1):  # preconditioning on a polynomial path, which divides by 0 at the end
        assert isinstance(prediction, PreconditionedVelocity)
        assert isinstance(path, PolynomialPath)
    else:
        assert training.start <= sampling.start < sampling.end <= training.end


@each_path
def test_sigma_limits_are_where_the_noise_levels_are(path):
    limits = sigma_limits(path)
    sigma = path.sigma(torch.tensor(limits, dtype=torch.float64))
    torch.testing.assert_close(sigma, torch.tensor([SIGMA_MAX, SIGMA_MIN], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("levels", [(0.0, 80.0), (-1.0, 80.0), (2.0, 1.0), (1.0, 1.0)])
def test_noise_levels_out_of_order_are_named(levels):
    with pytest.raises(ValueError, match=f"got {levels[0]} and {levels[1]}"):
        sigma_limits(CondOTPath(), *levels)


# Grids

grid_paths = st.one_of(
    st.sampled_from(PATHS),
    st.floats(1, 4).map(PolynomialPath),
    st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 40)).map(lambda rates: VPPath(*rates)),
)


@settings(max_examples=100)
@given(st.sampled_from(GRIDS), grid_paths, st.sampled_from(PREDICTIONS), st.booleans(), st.integers(2, 200))
def test_grids_increase_within_the_limits_and_take_the_stated_steps(grid, path, prediction, stochastic, steps):
    limits = sampling_limits(path, prediction, stochastic)
    times = grid.times(path, steps, limits)
    assert times.dtype == torch.float64
    assert (times.diff() > 0).all()
    assert times[0] >= limits.start - 1e-12
    assert times[-1] <= limits.end + 1e-12
    assert len(times) == (steps + 1 if times[-1] == 1 else steps)


def test_uniform_grid():
    uniform = UniformGrid().times(CondOTPath(), 4)
    torch.testing.assert_close(uniform, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64))


@each_path
def test_edm_grid_has_the_noise_levels_of_edm(path):
    """Karras et al. 2022, eq. 5, with N = 18 and rho = 7; t_N = 0 is the closing denoising step."""
    times = EDMGrid().times(path, 18)
    i = torch.arange(18, dtype=torch.float64)
    levels = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(path.sigma(times), levels, rtol=1e-8, atol=0)


@each_path
def test_logit_snr_grid_has_equal_steps_in_log_sigma(path):
    steps = path.sigma(LogitSNRGrid(0.01, 50.0).times(path, 12)).log().diff()
    torch.testing.assert_close(steps, torch.full_like(steps, math.log(0.01 / 50) / 11), rtol=1e-8, atol=0)


def test_grids_start_where_a_path_of_little_noise_starts():
    path = VPPath(0.1, 1.0)
    for grid in (EDMGrid(), LogitSNRGrid()):
        assert grid.times(path, 10)[0] == 0


@pytest.mark.parametrize(("grid", "fewest"), [(UniformGrid(), 1), (EDMGrid(), 2), (LogitSNRGrid(), 2)])
def test_too_few_steps_are_named(grid, fewest):
    assert len(grid.times(CondOTPath(), fewest)) == 2
    with pytest.raises(ValueError, match=f"at least {fewest} for this grid, got {fewest - 1}"):
        grid.times(CondOTPath(), fewest - 1)


def test_bad_grid_parameters_are_named():
    with pytest.raises(ValueError, match="rho must be positive, got -7"):
        EDMGrid(rho=-7)
    with pytest.raises(ValueError, match=r"got 1 and 0\.5"):
        LogitSNRGrid(1, 0.5).times(CondOTPath(), 5)
