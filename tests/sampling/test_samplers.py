import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fmlit import solvers
from fmlit.core.randomness import image_noise, image_seeds
from fmlit.flows.diffusions import BetaDiffusion, ReverseDiffusion, sde_drift
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, VPPath
from fmlit.flows.predictions import Velocity
from fmlit.metrics import Protocol
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.generate import balanced_labels, generate
from fmlit.sampling.grids import EDMGrid, LogitSNRGrid, UniformGrid
from fmlit.sampling.guidance import classifier_free
from fmlit.sampling.samplers import ChurnSampler, ODESampler, Sampler, SDESampler
from fmlit.solvers.records import SOLVERS, solver_names
from tests.helpers.oracle import PATHS, PREDICTIONS, cdf, oracle_model
from tests.helpers.small_runs import tiny_mlp, tiny_unet

MIXTURE = GaussianMixture([[-1.0], [1.5]], [0.3, 0.5], [0.6, 0.4])
CLASSES = [GaussianMixture([[-1.0]], 0.3), GaussianMixture([[1.5]], 0.5), MIXTURE]
ERRORS = {"euler": 0.03, "ddim": 0.03, "dpmpp_2m": 0.006, "rk4": 1e-4, "dopri5": 1e-4}  # at 40 steps; others 0.003

each_path = pytest.mark.parametrize("path", PATHS, ids=repr)


def error(sampler: Sampler, model: GenerativeModel, truth: GaussianMixture = MIXTURE, labels=None) -> float:
    """An ODE in one dimension keeps the order of points: the quantile of the noise must be that of the sample."""
    seeds = image_seeds(0, range(64))
    samples = sampler.sample(model, seeds, labels).double().numpy()
    return abs(cdf(truth, samples) - stats.norm.cdf(image_noise(seeds, (1,)).double().numpy())).max()


class Counted(nn.Module):
    """A network that counts its evaluations."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.evaluations = net, 0

    def forward(self, *arguments):
        self.evaluations += 1
        return self.net(*arguments)


class Broken(nn.Module):
    """A network that fails, with a part that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Dropout()

    def forward(self, *arguments):
        raise RuntimeError("broken")


def small_model(net=tiny_mlp, shape=(1, 8, 8), **arguments) -> GenerativeModel:
    """A class-conditional network with random weights."""
    torch.manual_seed(0)
    net = net(shape, 3, **arguments)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return GenerativeModel(net, CondOTPath(), Velocity(), shape, 3)


@each_path
@pytest.mark.parametrize("method", solver_names("ODE", "exponential"))
def test_every_ode_method_ends_in_the_mixture(method, path):
    assert error(ODESampler(method, steps=40), oracle_model([MIXTURE], path)) < ERRORS.get(method, 0.003)


@each_path
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
@pytest.mark.parametrize("method", ["heun", "unipc"])
def test_every_prediction_ends_in_the_mixture(method, prediction, path):
    assert error(ODESampler(method, steps=40), oracle_model([MIXTURE], path, prediction)) < 0.003


@each_path
@pytest.mark.parametrize("grid", [UniformGrid(), LogitSNRGrid()], ids=repr)
def test_every_grid_ends_in_the_mixture(grid, path):
    assert error(ODESampler("heun", steps=60, grid=grid), oracle_model([MIXTURE], path)) < 0.01


@each_path
@pytest.mark.parametrize("method", solver_names("SDE"))
@pytest.mark.parametrize("sigma", [BetaDiffusion(), ReverseDiffusion()], ids=repr)
def test_every_sde_ends_in_the_mixture(sigma, method, path):
    prediction = PREDICTIONS[PATHS.index(path)]
    model = oracle_model([MIXTURE], path, prediction)
    samples = SDESampler(sigma, method, steps=40).sample(model, image_seeds(0, range(400))).flatten().double()
    assert stats.kstest(samples.numpy(), lambda x: cdf(MIXTURE, x)).pvalue > 1e-3


@each_path
def test_churn_ends_in_the_mixture(path):
    model = oracle_model([MIXTURE], path, PREDICTIONS[PATHS.index(path)])
    samples = ChurnSampler(steps=40).sample(model, image_seeds(0, range(400))).flatten().double()
    assert stats.kstest(samples.numpy(), lambda x: cdf(MIXTURE, x)).pvalue > 1e-3
    still = ChurnSampler(steps=40, s_churn=0.0)
    assert error(still, model) < 0.003  # without noise it is Heun's method
    assert error(ChurnSampler(steps=40), model) > 0.1


@pytest.mark.parametrize("method", solver_names("SDE"))
def test_an_sde_is_the_papers_with_noise_by_seed(method):
    model, seeds, sigma = oracle_model([MIXTURE], CondOTPath()), image_seeds(3, range(5)), BetaDiffusion(1.5)
    sampler = SDESampler(sigma, method, steps=12, grid=EDMGrid())
    times = EDMGrid().times(model.path, 12, sampler.limits(model))
    diffusion = sigma.along(model.path)
    x = getattr(solvers, method)(
        sde_drift(model.velocity, model.score, diffusion),
        diffusion,
        (1 - times[0].float()) * image_noise(seeds, (1,)),
        times,
        noise=lambda i, like: image_noise(seeds, (1,), "sde", i),
    )
    expected = model.data(x, times[-1].float().expand(5))
    torch.testing.assert_close(sampler.sample(model, seeds), expected, rtol=1e-4, atol=1e-4)


def test_churn_counts_the_closing_step_as_edm_does(monkeypatch):
    given, sampler = {}, ChurnSampler(steps=7)
    fake = replace(SOLVERS["churn"], function=lambda field, x0, *_, **settings: given.update(settings) or x0)
    monkeypatch.setitem(SOLVERS, "churn", fake)
    sampler.sample(oracle_model([MIXTURE], CondOTPath()), SEEDS)
    assert given["steps"] == 7


def test_methods_are_the_solvers_by_name():
    for name in solver_names("ODE", "exponential"):
        assert ODESampler(name).method == name
    for name in solver_names("SDE"):
        assert SDESampler(method=name).method == name
    assert solver_names("churn") == (ChurnSampler.method,)


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [
        (ODESampler(), 35),  # EDM's count: 17 steps of two evaluations, and the closing denoising step
        (ODESampler("euler"), 18),
        (ODESampler("rk4"), 17 * 4 + 1),
        (ODESampler("heun", grid=UniformGrid()), 36),  # up to t = 1, nothing to close
        (ODESampler("unipc", 10), 10),
        (ODESampler("dpmpp_2m", 10), 10),
        (SDESampler(steps=25), 25),
        (SDESampler(method="stochastic_heun", steps=25), 24 * 2 + 1),
        (ODESampler(guidance=2.0), 35),  # of a doubled batch
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_number_of_function_evaluations(sampler, evaluations):
    model = oracle_model(CLASSES, CondOTPath())
    model.net = Counted(model.net)
    sampler.sample(model, image_seeds(0, range(2)), torch.tensor([0, 1]))
    assert model.net.evaluations == evaluations


def test_names():
    names = [ODESampler().name, ODESampler("unipc", 10, guidance=1.5).name, SDESampler().name]
    assert names == ["heun18", "unipc10+cfg1.5", "eulermaruyama250"]


def test_names_tell_every_setting_that_changes_the_images():
    named = {
        "heun18": ODESampler(grid=EDMGrid()),
        "midpoint10+uniform": ODESampler("midpoint", 10, grid=UniformGrid()),
        "heun18+edm_rho5+cfg2": ODESampler(grid=EDMGrid(rho=5.0), guidance=2.0),
        "heun18+edm_sigma_min1e_05": ODESampler(grid=EDMGrid(sigma_min=1e-5)),
        "eulermaruyama250+reverse": SDESampler(ReverseDiffusion()),
        "eulermaruyama250+beta_scale0.5+edm": SDESampler(BetaDiffusion(0.5), grid=EDMGrid()),
        "churn128+s_churn80": ChurnSampler(s_churn=80.0),
    }
    assert {sampler.name for sampler in named.values()} == set(named)
    for name, sampler in named.items():
        assert sampler.name == name
        assert str(Protocol("pixels", 1000, "train", sampler=name)).endswith(f"-{name}")


@pytest.mark.parametrize("path", [CondOTPath(), VPPath()], ids=repr)
def test_a_trajectory_starts_with_scaled_noise_and_ends_in_the_sample(path):
    model, sampler, seeds = oracle_model([MIXTURE], path), ODESampler(steps=6), image_seeds(0, range(3))
    states = sampler.sample(model, seeds, trajectory=True)
    assert states.shape == (7, 3, 1)
    assert torch.equal(states[-1], sampler.sample(model, seeds))
    start = path.time_of_sigma(torch.tensor(80.0))
    torch.testing.assert_close(states[0], path.beta(start) * image_noise(seeds, (1,)))
    assert SDESampler(steps=6).sample(model, seeds, trajectory=True).shape == (7, 3, 1)
    uniform = ODESampler("euler", 6, UniformGrid())
    whole_clock = uniform.sample(oracle_model([MIXTURE], CondOTPath()), seeds, trajectory=True)
    assert whole_clock.shape == (7, 3, 1)
    assert torch.equal(whole_clock[0], image_noise(seeds, (1,)))


def test_labels_and_their_absence():
    model, sampler = oracle_model(CLASSES, CondOTPath()), ODESampler(steps=40)
    for k in range(2):
        labels = torch.full((64,), k)
        assert error(sampler, model, CLASSES[k], labels) < 0.01  # off center, which noise of sigma 80 does not know
        # scale 0 leaves the unconditional field
        assert error(ODESampler(steps=40, guidance=0.0), model, MIXTURE, labels) < 0.003
    assert error(sampler, model, MIXTURE) < 0.003


def test_guidance_is_classifier_free():
    model, seeds, labels = oracle_model(CLASSES, CondOTPath()), image_seeds(0, range(6)), torch.arange(6) % 2
    field = classifier_free(lambda x, t: model.velocity(x, t, labels), model.velocity, 2.5)
    expected = solvers.heun(field, image_noise(seeds, (1,)), UniformGrid().times(model.path, 20))
    guided = ODESampler("heun", 20, UniformGrid(), guidance=2.5).sample(model, seeds, labels)
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(guided, ODESampler("heun", 20, UniformGrid()).sample(model, seeds, labels), atol=0.1)


@pytest.mark.parametrize("sampler", [ODESampler("heun", 4), SDESampler(steps=4)], ids=lambda s: s.name)
@pytest.mark.parametrize("net", [tiny_unet, tiny_mlp], ids=["UNet", "MLP"])
def test_an_image_does_not_depend_on_ranks_or_number(net, sampler):
    model, n, size = small_model(net), 11, 4
    alone = dict(pair for kept, x in generate(model, sampler, n, 7, size) for pair in zip(kept, x, strict=True))
    assert sorted(alone) == list(range(n))
    assert len(torch.stack(list(alone.values())).flatten(1).unique(dim=0)) == n
    for world_size, number in [(2, n), (3, n), (5, n), (1, 6), (2, 9)]:
        found = {}
        for rank in range(world_size):
            for kept, samples in generate(model, sampler, number, 7, size, rank=rank, world_size=world_size):
                assert len(kept) == len(samples)
                assert not found.keys() & set(kept)
                found.update(zip(kept, samples, strict=True))
        assert sorted(found) == list(range(number))
        assert all(torch.equal(found[i], alone[i]) for i in found)
    other = next(generate(model, sampler, n, 8, size))[1]
    assert not torch.equal(other[0], alone[0])


def test_generated_labels_are_those_asked_for_or_classes_in_turn():
    model, sampler = small_model(), ODESampler("euler", 4)
    in_turn = torch.cat([x for _, x in generate(model, sampler, 5, batch_size=2)])
    assert torch.equal(balanced_labels(model, range(5)), torch.tensor([0, 1, 2, 0, 1]))
    asked = torch.cat([x for _, x in generate(model, sampler, 5, batch_size=2, labels=torch.tensor([0, 1, 2, 0, 1]))])
    assert torch.equal(in_turn, asked)
    ones = torch.cat([x for _, x in generate(model, sampler, 5, batch_size=2, labels=torch.ones(5, dtype=torch.int64))])
    assert [torch.equal(a, b) for a, b in zip(ones, asked, strict=True)] == [False, True, False, False, True]
    assert balanced_labels(oracle_model([MIXTURE], CondOTPath()), range(5)) is None


@pytest.mark.parametrize(
    "sampler", [ODESampler("heun", 3), ODESampler("dopri5", 3), SDESampler(steps=3), ChurnSampler(3)]
)
def test_global_random_numbers_are_not_touched(sampler):
    model = small_model().train()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    sampler.sample(model, image_seeds(0, range(2)), torch.tensor([0, 1]))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_modes_come_back_as_they_were_and_dropout_sleeps():
    model, seeds = small_model(tiny_unet, dropout=0.5).train(), image_seeds(0, range(2))
    model.net.unet.mid_block.eval()  # frozen by its user
    modes = [m.training for m in model.modules()]
    sampler = ODESampler("euler", 4)
    first = sampler.sample(model, seeds)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(sampler.sample(model, seeds), first)
    assert torch.equal(sampler.sample(model.eval(), seeds), first)

    broken = model.with_net(Broken())
    broken.net.frozen.eval()
    with pytest.raises(RuntimeError, match="broken"):
        sampler.sample(broken, seeds)
    assert [m.training for m in broken.net.modules()] == [True, False]


def test_samples_carry_no_gradient_and_may_be_none():
    model = small_model()
    assert not ODESampler("euler", 4).sample(model, image_seeds(0, range(2))).requires_grad
    assert ODESampler("euler", 4).sample(model, image_seeds(0, [])).shape == (0, 1, 8, 8)


LABELS, SEEDS = torch.tensor([0, 1]), image_seeds(0, range(2))
WRONG_CALLS = [
    (partial(ODESampler().sample, labels=torch.tensor([0, 3])), "class id 3 is unknown: this model has classes 0 to 2"),
    (partial(ODESampler().sample, labels=torch.tensor([-1, 0])), "class id -1 is unknown"),
    (partial(ODESampler().sample, labels=torch.tensor([0])), r"shape of seeds \(2,\), got \(1,\)"),
    (partial(ODESampler(guidance=2.0).sample), "guidance 2.0 needs a class-conditional model and labels"),
]


@pytest.mark.parametrize(("call", "message"), WRONG_CALLS)
def test_wrong_labels_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_model(), SEEDS)


def test_labels_for_an_unconditional_model_are_refused():
    with pytest.raises(ValueError, match="labels were given to an unconditional model"):
        ODESampler().sample(oracle_model([MIXTURE], CondOTPath()), SEEDS, LABELS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(ODESampler, grid="EDMGrid"), r"grid must be a grid such as fmlit.UniformGrid\(\), got 'EDMGrid'"),
        (partial(ODESampler, "huen"), "unknown method 'huen': choose from euler, midpoint, heun"),
        (partial(SDESampler, method="heun"), "unknown method 'heun': choose from euler_maruyama, stochastic_heun"),
        (partial(ODESampler, steps=0), "steps must be at least 1, got 0"),
        (partial(SDESampler, steps=-1), "steps must be at least 1, got -1"),
        (partial(ChurnSampler, s_min=2.0, s_max=1.0), "churn needs s_min <= s_max, got 2.0 and 1.0"),
        (partial(ChurnSampler, s_churn=-1.0), "s_churn must not be negative, got -1.0"),
        (partial(ODESampler, guidance=-0.5), "guidance: the scale must be finite and at least 0, got -0.5"),
        (partial(SDESampler, guidance=float("nan")), "guidance: the scale must be finite and at least 0, got nan"),
        (lambda: next(generate(small_model(), ODESampler(), 0)), "n and batch_size must be at least 1, got 0 and 256"),
        (lambda: next(generate(small_model(), ODESampler(), 3, labels=LABELS)), "each of the 3 samples, got 2"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
