"""Where samplers may walk, and what they refuse before the first step."""

import warnings

import pytest
import torch

from fmlit.core.randomness import image_seeds
from fmlit.flows.diffusions import BetaDiffusion, ConstantDiffusion, ReverseDiffusion
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, CosinePath, PolynomialPath, VPPath
from fmlit.flows.predictions import Noise, Velocity
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.grids import EDMGrid, LogitSNRGrid, UniformGrid
from fmlit.sampling.samplers import ChurnSampler, ODESampler, SDESampler
from fmlit.training.callbacks import QualityCurve, SampleGrid
from tests.helpers.known_model import known_model
from tests.helpers.oracle import oracle_model
from tests.helpers.small_runs import digits_module, fit, tiny_mlp

SEEDS = image_seeds(0, range(40))


def model(num_classes=None, coupled=False, prediction=Velocity()) -> GenerativeModel:
    torch.manual_seed(0)
    return GenerativeModel(tiny_mlp((2,), num_classes), CondOTPath(), prediction, (2,), num_classes, coupled)


STOCHASTIC = [SDESampler(steps=2, guidance=2.0), ChurnSampler(steps=2, guidance=2.0)]


@pytest.mark.parametrize("sampler", STOCHASTIC, ids=lambda sampler: sampler.method)
def test_a_model_of_paired_noise_and_data_has_no_score_to_follow_nor_has_such_a_guide(sampler):
    labels = torch.zeros_like(SEEDS)
    paired, plain = model(3, coupled=True), model(3)
    for follows, guide in ((paired, None), (paired.with_net(paired.net), None), (plain, paired), (paired, plain)):
        with pytest.raises(ValueError, match=f"{type(sampler).__name__} needs the score, which does not follow"):
            sampler.sample(follows, SEEDS, labels, guide=guide)
    sampler.sample(plain, SEEDS, labels, guide=plain)
    ODESampler(steps=2, guidance=2.0).sample(plain, SEEDS, labels, guide=paired)


IMPOSSIBLE = [
    (ODESampler(guidance=2.0), "guidance 2 needs a class-conditional model, or a guide"),
    (ODESampler("ddim", steps=1), "steps must be at least 2 for this grid, got 1"),
    (SDESampler(steps=1), "steps must be at least 2 for this grid, got 1"),
    (ODESampler(grid=EDMGrid(sigma_min=2.0, sigma_max=1.0)), "0 < sigma_min < sigma_max, got 2.0 and 1.0"),
]


@pytest.mark.parametrize(("sampler", "message"), IMPOSSIBLE)
def test_what_cannot_be_sampled_is_known_before_training(sampler, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sampler.check(model())
    started = []
    for key, callback in (("samples", SampleGrid(12, sampler)), ("quality", QualityCurve(12, sampler=sampler))):
        module = digits_module(conditional=False)
        module.on_train_start = lambda: started.append(1)
        with pytest.raises(ValueError, match=f"{key}.sampler: .*{message}"):
            fit(module, tmp_path, 1, callback)
    assert not started
    if "guidance" in message:
        sampler.check(model(), guide=model())


@pytest.mark.parametrize("grid", [EDMGrid, LogitSNRGrid])
@pytest.mark.parametrize(
    ("make", "prediction"),
    [
        (lambda grid: ODESampler("unipc", 6, grid), Velocity()),
        (lambda grid: ODESampler("heun", 6, grid), Velocity()),
        (lambda grid: ODESampler("heun", 6, grid), Noise()),
        (lambda grid: SDESampler(steps=6, grid=grid), Velocity()),
        (lambda grid: ChurnSampler(6, grid=grid), Velocity()),
    ],
)
def test_a_grid_of_noise_levels_has_those_that_it_was_given(make, prediction, grid):
    for low, high in ((0.002, 80.0), (1e-4, 500.0), (0.05, 10.0)):
        times = make(grid(sigma_min=low, sigma_max=high)).times(model(prediction=prediction))
        first, last = CondOTPath().sigma(times[[0, -1]]).tolist()
        assert (last, first) == pytest.approx((low, high), rel=1e-9)


@pytest.mark.parametrize("std", [0.0, 0.03])
@pytest.mark.parametrize("method", ["euler_maruyama", "stochastic_heun"])
@pytest.mark.parametrize("grid", [UniformGrid(), EDMGrid()], ids=repr)
@pytest.mark.parametrize("path", [CondOTPath(), VPPath()], ids=repr)
def test_steps_follow_a_diffusion_that_stays_where_the_noise_of_the_path_ends(path, grid, method, std):
    """At full strength the last steps would multiply the noise: distances of 1e3 with std 0.01, and 1e8 with 0."""
    torch.manual_seed(0)
    means = torch.randn(20, 64)
    mixture = GaussianMixture(means, torch.full((20,), std), torch.ones(20) / 20)
    sampler = SDESampler(ConstantDiffusion(1.0), method, 250, grid)
    samples = sampler.sample(oracle_model([mixture], path), SEEDS)
    distance = (torch.cdist(samples, means).min(1).values.square().mean() / 64).sqrt()
    assert distance == pytest.approx(std, rel=0.35, abs=1e-3)


def test_a_diffusion_is_lowered_only_where_steps_could_not_follow_it():
    path, x = CondOTPath(), torch.zeros(1, 2)
    times = torch.tensor([0.0, 0.5, 0.9, 0.98, 1.0])
    bound = [(1 - t) * (2 / h) ** 0.5 for t, h in zip(times.tolist(), [0.5, 0.5, 0.4, 0.08, 0.02], strict=True)]
    for diffusion in (ConstantDiffusion(0.5), BetaDiffusion(), ReverseDiffusion()):
        free, bounded = diffusion.along(path), diffusion.along(path, times)
        for t, most in zip(times, bound, strict=True):
            assert bounded(x, t[None]).item() == pytest.approx(min(free(x, t[None]).item(), most), abs=1e-6)
    fine = torch.linspace(0.0123, 0.998, 250)  # what is usual stays as it is
    for diffusion in (BetaDiffusion(), BetaDiffusion(5.0), ReverseDiffusion()):
        for t in fine[:-1, None]:
            assert torch.equal(diffusion.along(path, fine)(x, t), diffusion.along(path)(x, t))


def test_a_path_that_begins_with_data_is_named_before_noise_alone_is_taken_for_its_start():
    with pytest.warns(UserWarning, match=r"VPPath\(rate_min=0.5, rate_max=5.0\) still holds 0.25 of the data at t = 0"):
        ODESampler().check(known_model(path=VPPath(0.5, 5.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (CondOTPath(), CosinePath(), PolynomialPath(3), VPPath()):
            ODESampler().check(known_model(path=path))
            SDESampler().check(known_model(path=path))
