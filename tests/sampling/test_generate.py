"""``fmlit.sample``: the samples of the sampler that it names, and its own example."""

import doctest
import inspect

import pytest
import torch

import fmlit
from fmlit.core.errors import UserError
from fmlit.core.randomness import image_seeds
from fmlit.sampling.build import build_sampler
from fmlit.sampling.generate import generate


def random_model(shape=(1, 8, 8), num_classes: int | None = 3) -> fmlit.GenerativeModel:
    torch.manual_seed(0)
    net = fmlit.MLP(shape, num_classes, width=16, depth=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return fmlit.GenerativeModel(net, fmlit.CondOTPath(), fmlit.Velocity(), shape, num_classes)


MODEL = random_model()


def test_the_example_in_the_docstring():
    (example,) = doctest.DocTestFinder().find(fmlit.sample, "sample", globs={})
    assert len(example.examples) == 5
    result = doctest.DocTestRunner().run(example)
    assert (result.attempted, result.failed) == (5, 0)


def test_samples_are_those_of_the_sampler():
    expected = build_sampler("midpoint", 10).sample(MODEL, image_seeds(3, range(5)), torch.tensor([0, 1, 2, 0, 1]))
    images = fmlit.sample(MODEL, 5, seed=3)
    assert images.dtype == torch.float32
    assert (expected.abs() > 1).any()  # so that there is something to clamp
    assert torch.equal(images, expected.clamp(-1, 1))


def test_everything_that_is_given_reaches_the_sampler():
    given = {
        "solver": "unipc",
        "steps": 6,
        "guidance": 2.0,
        "guidance_interval": (0.3, 0.9),
        "grid": fmlit.EDMGrid(rho=5.0),
        "options": {"order": 3},
        "precision": "bfloat16",
    }
    sampler, guide = build_sampler(**given), random_model(num_classes=None)
    batches = generate(MODEL, sampler, 5, 1, 2, torch.tensor([2, 0, 2, 0, 2]), guide=guide)
    expected = torch.cat([batch for _, batch in batches]).clamp(-1, 1)
    assert torch.equal(fmlit.sample(MODEL, 5, [2, 0], 1, **given, guide=guide, batch_size=2), expected)
    stochastic = fmlit.sample(MODEL, 3, seed=1, solver="euler_maruyama", sigma=0.5)
    assert not torch.equal(stochastic, fmlit.sample(MODEL, 3, seed=1, solver="euler_maruyama"))


@pytest.mark.parametrize(
    ("labels", "dealt"),
    [
        (None, [0, 1, 2, 0, 1]),
        (2, [2, 2, 2, 2, 2]),
        ([2, 0], [2, 0, 2, 0, 2]),
        (range(2), [0, 1, 0, 1, 0]),
        (torch.tensor([1, 2]), [1, 2, 1, 2, 1]),
    ],
)
def test_labels_are_dealt_in_turn(labels, dealt):
    expected = build_sampler("midpoint", 2).sample(MODEL, image_seeds(0, range(5)), torch.tensor(dealt))
    assert torch.equal(fmlit.sample(MODEL, 5, labels, steps=2), expected.clamp(-1, 1))


def test_vectors_are_not_clamped():
    model = random_model((2,), None)
    points = fmlit.sample(model, 200)
    assert points.shape == (200, 2)
    assert points.abs().max() > 1
    assert not points.requires_grad
    assert torch.allclose(fmlit.sample(model, 300)[:200], points, atol=1e-5)  # a larger n adds to the same first ones


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n and batch_size must be at least 1, got 0"),
        ({"batch_size": 0}, "n and batch_size must be at least 1, got 16 and 0"),
        ({"labels": 3}, "labels: class id 3 is unknown: this model has classes 0 to 2"),
        ({"labels": []}, r"labels must be a class id or several, such as 3 or \[3, 7\], got \[\]"),
        ({"labels": ["cat"]}, r"labels must be a class id or several, .* got \['cat'\]"),
        ({"labels": 1.5}, "labels must be a class id or several, .* got 1.5"),
        ({"solver": "hoin"}, "unknown solver 'hoin'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"solver": "heun", "options": {"order": 2}}, "heun has no option 'order'"),
        ({"seed": -1}, "seed must lie in"),
        ({"model": "runs/mine"}, r"model must be a fmlit\.GenerativeModel, got str"),
        ({"model": random_model(num_classes=None), "labels": 1}, "labels were given to an unconditional model"),
        ({"model": random_model(num_classes=None), "guidance": 2.0}, "guidance 2 needs a class-conditional model"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        fmlit.sample(**{"model": MODEL} | arguments)


def test_no_more_arguments_than_a_reader_can_hold():
    assert len(inspect.signature(fmlit.sample).parameters) <= 15
