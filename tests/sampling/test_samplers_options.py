"""Options of solvers and the guidance interval: from samplers to samples, names and errors."""

import dataclasses

import pytest
import torch

from fmlit import solvers
from fmlit.core.errors import UserError
from fmlit.core.randomness import image_noise, image_seeds
from fmlit.flows.diffusions import BetaDiffusion, ConstantDiffusion
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath
from fmlit.metrics import Protocol
from fmlit.sampling.build import build_sampler
from fmlit.sampling.grids import EDMGrid, UniformGrid
from fmlit.sampling.guidance import autoguidance, classifier_free
from fmlit.sampling.samplers import ChurnSampler, ODESampler, SDESampler
from fmlit.solvers.records import SOLVERS, solver_names
from tests.helpers.oracle import oracle_model

CLASSES = [GaussianMixture([[-1.0]], 0.3), GaussianMixture([[1.5]], 0.5), GaussianMixture([[0.3]], 0.9)]
MODEL = oracle_model(CLASSES, CondOTPath())
SEEDS, LABELS = image_seeds(0, range(6)), torch.arange(6) % 2
OPTIONS = [
    ("unipc", {"order": 1}, "unipc8+order1"),
    ("unipc", {"order": 3}, "unipc8+order3"),
    ("ipndm", {"variable_step": True}, "ipndm8+variable_step"),
    ("dpmpp_3m", {"corrected": True}, "dpmpp3m8+corrected"),
    ("dopri5", {"rtol": 1e-2, "atol": 1e-3}, "dopri5+atol0.001+rtol0.01"),
    ("churn", {"s_churn": 4.0, "s_noise": 1.0}, "churn8+s_churn4+s_noise1"),
]


@pytest.mark.parametrize(("solver", "options", "name"), OPTIONS)
def test_options_reach_the_solver_and_the_name(solver, options, name):
    sampler, plain = build_sampler(solver, 8, options=options), build_sampler(solver, 8)
    assert sampler.name == name
    assert not torch.equal(sampler.sample(MODEL, SEEDS), plain.sample(MODEL, SEEDS))
    times = sampler.times(MODEL)
    x0 = (1 - times[0].float()) * image_noise(SEEDS, (1,))
    record = SOLVERS[solver]
    extra = () if record.kind == "ODE" else (MODEL.path,)
    noise = {"noise": lambda i, like: image_noise(SEEDS, (1,), "sde", i), "steps": 8} if solver == "churn" else {}
    x = record.function(MODEL.velocity, x0, times, *extra, **noise, **options)
    if times[-1] < 1:
        x = MODEL.data(x, times[-1].float().expand(6))
    assert torch.equal(sampler.sample(MODEL, SEEDS), x)


@pytest.mark.parametrize("solver", solver_names())
def test_defaults_in_full_change_neither_samples_nor_name(solver):
    plain, full = build_sampler(solver, 5), build_sampler(solver, 5, options=SOLVERS[solver].options)
    assert full.name == plain.name
    assert torch.equal(full.sample(MODEL, SEEDS), plain.sample(MODEL, SEEDS))


def test_churn_has_the_defaults_of_its_solver():
    defaults = {f.name: f.default for f in dataclasses.fields(ChurnSampler) if f.name.startswith("s_")}
    assert defaults == SOLVERS["churn"].options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ODESampler("heun", options={"order": 3}), "heun has no option 'order': it takes no options"),
        (lambda: ODESampler("unipc", options={"corrected": True}), "unipc has no option 'corrected': choose from"),
        (lambda: ODESampler("unipc", options={"order": 4}), "unipc order must be 1, 2 or 3, got 4"),
        (lambda: build_sampler("euler_maruyama", options={"s_churn": 1.0}), "euler_maruyama has no option 's_churn'"),
        (lambda: build_sampler("churn", options={"order": 1}), "churn has no option 'order': choose from s_churn"),
        (lambda: build_sampler("hoin"), "unknown solver 'hoin': choose from euler, midpoint, .*, churn"),
        (lambda: build_sampler("unipc", sigma=1.0), "sigma is the noise of an SDE, and unipc takes none"),
        (lambda: ODESampler(guidance_interval=(0.8, 0.2)), r"guidance_interval must .* got \(0\.8, 0\.2\)"),
        (lambda: SDESampler(guidance_interval=(0.0, 1.5)), r"guidance_interval must .* got \(0\.0, 1\.5\)"),
        (lambda: ChurnSampler(guidance_interval=(0.5,)), r"guidance_interval must .* got \(0\.5,\)"),
    ],
)
def test_mistakes_are_named_when_the_sampler_is_built(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_samplers_by_name():
    ode, sde = build_sampler("unipc", 5, None, 1.5), build_sampler("euler_maruyama", sigma=0.5)
    assert (ode.name, sde.name) == ("unipc5+cfg1.5", "eulermaruyama250+constant_value0.5")
    assert sde.sigma == ConstantDiffusion(0.5)
    assert build_sampler("stochastic_heun", 10, sigma=BetaDiffusion(2.0)).sigma == BetaDiffusion(2.0)
    assert build_sampler("churn") == ChurnSampler()
    assert build_sampler("heun") == ODESampler()


@pytest.mark.parametrize("sampler", [ODESampler(), SDESampler(), ChurnSampler()], ids=lambda sampler: sampler.method)
def test_a_sampler_cannot_be_changed(sampler):
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.steps = 3
    assert hash(sampler) == hash(dataclasses.replace(sampler))


def test_guidance_acts_in_its_interval_only():
    conditional, times = lambda x, t: MODEL.velocity(x, t, LABELS), UniformGrid().times(MODEL.path, 20)
    noise, interval = image_noise(SEEDS, (1,)), (0.2, 0.7)

    def drawn(interval, guide=None):
        sampler = ODESampler("heun", 20, UniformGrid(), guidance=2.5, guidance_interval=interval)
        return sampler.sample(MODEL, SEEDS, LABELS, guide=guide)

    field = classifier_free(conditional, MODEL.velocity, 2.5, interval)
    torch.testing.assert_close(drawn(interval), solvers.heun(field, noise, times), rtol=1e-5, atol=1e-5)
    guide = oracle_model([CLASSES[2]], CondOTPath())
    field = autoguidance(conditional, guide.velocity, 2.5, interval)
    torch.testing.assert_close(drawn(interval, guide), solvers.heun(field, noise, times), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(drawn(interval), drawn((0.0, 1.0)), atol=0.05)
    unguided = ODESampler("heun", 20, UniformGrid()).sample(MODEL, SEEDS, LABELS)
    assert not torch.allclose(drawn(interval), unguided, atol=0.05)


@pytest.mark.parametrize("solver", ["heun", "stochastic_heun", "churn"])
def test_every_kind_of_sampler_has_the_interval(solver):
    always = build_sampler(solver, 8, guidance=2.0).sample(MODEL, SEEDS, LABELS)
    sometimes = build_sampler(solver, 8, guidance=2.0, guidance_interval=(0.5, 1.0)).sample(MODEL, SEEDS, LABELS)
    assert not torch.equal(always, sometimes)


def test_names_of_samplers_that_differ_differ():
    named = {
        "heun18+cfg2": ODESampler(guidance=2.0),
        "heun18+cfg2_0.2to0.8": ODESampler(guidance=2.0, guidance_interval=(0.2, 0.8)),
        "heun18+cfg2_0to0.8": ODESampler(guidance=2.0, guidance_interval=(0.0, 0.8)),
        "heun18+cfg2.0000001": ODESampler(guidance=2.0000001),
        "heun18": ODESampler(guidance_interval=(0.2, 0.8)),  # no guidance, and so no interval
        "dopri5+rtol1e_06": ODESampler("dopri5", options={"rtol": 1e-6}),
        "dopri5+rtol1.0000001e_06": ODESampler("dopri5", options={"rtol": 1.0000001e-6}),
        "heun18+edm_rho5.0000001": ODESampler(grid=EDMGrid(rho=5.0000001)),
        "unipc18+uniform+order3+cfg1.5": ODESampler("unipc", 18, UniformGrid(), 1.5, options={"order": 3}),
        "eulermaruyama250+cfg2_0.5to1": SDESampler(guidance=2.0, guidance_interval=(0.5, 1.0)),
    }
    for name, sampler in named.items():
        assert sampler.name == name
        assert str(Protocol("pixels", 1000, "train", sampler=name)).endswith(f"-{name}")
    interval = ODESampler(guidance=2.0, guidance_interval=(0.2, 0.8))
    assert interval.named(guided=True) == "heun18+auto2_0.2to0.8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", SEEDS), r"model must be a fmlit\.GenerativeModel, got str"),
        ((MODEL, 4), "seeds must be an int64 tensor"),
        ((MODEL, SEEDS.float()), "seeds must be an int64 tensor"),
        ((MODEL, SEEDS, [0, 1, 0, 1, 0, 1]), "labels must be an int64 tensor of class ids, got list"),
        ((MODEL, SEEDS, LABELS.float()), r"labels must be an int64 tensor of class ids, got torch\.float32"),
        ((MODEL, SEEDS, LABELS, False, "guide"), r"guide must be a fmlit\.GenerativeModel, got str"),
    ],
)
def test_wrong_arguments_of_sample_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        ODESampler(steps=2).sample(*arguments)
