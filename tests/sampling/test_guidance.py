import pytest
import torch
from torch import nn

from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, CosinePath, VPPath
from fmlit.flows.predictions import Velocity
from fmlit.sampling.guidance import autoguidance, classifier_free, classifier_free_by_label

PATHS = [CondOTPath(), CosinePath(), VPPath()]
RULES = [classifier_free, autoguidance]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


class Recorded:
    """A field that keeps the batch sizes it was called with."""

    def __init__(self, field):
        self.field, self.calls = field, []

    def __call__(self, x, t, *labels):
        self.calls.append(len(x))
        return self.field(x, t, *labels)


class Network(nn.Module):
    """The smallest class-conditional field of images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mix = nn.Embedding(4, 3), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t, labels):
        return torch.tanh(self.mix(x) + (self.embedding(labels) * t[:, None])[:, :, None, None])


def batch(shape=(3, 4, 4), n=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, *shape, generator=g), 0.1 + 0.8 * torch.rand(n, generator=g)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guided_score_is_that_of_the_tilted_density(path, scale):
    """The gradient of scale log p_t(x | class) + (1 - scale) log p_t(x), by autograd of the exact mixture densities."""
    g = torch.Generator().manual_seed(0)
    means = torch.randn(4, 2, dtype=torch.float64, generator=g)
    everything, one_class = GaussianMixture(means, 0.5), GaussianMixture(means[:2], 0.5)
    x, t = torch.randn(6, 2, dtype=torch.float64, generator=g), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    x = x.requires_grad_()
    tilted = scale * one_class.log_prob(x, path, t) + (1 - scale) * everything.log_prob(x, path, t)
    (score,) = torch.autograd.grad(tilted.sum(), x)

    guided = classifier_free(lambda x, t: one_class.score(x, path, t), lambda x, t: everything.score(x, path, t), scale)
    torch.testing.assert_close(guided(x, t), score, rtol=0, atol=1e-10)

    velocity = classifier_free(
        lambda x, t: one_class.velocity(x, path, t), lambda x, t: everything.velocity(x, path, t), scale
    )
    converted = Velocity().score(path, velocity(x, t), x, t)  # guiding velocities is guiding scores
    torch.testing.assert_close(converted, score, rtol=0, atol=1e-8)


@each_rule
def test_scale_one_leaves_the_field_alone(rule):
    field, guide = Recorded(lambda x, t: x), Recorded(lambda x, t: -x)
    x, t = batch()
    assert torch.equal(rule(field, guide, 1.0)(x, t), x)
    assert (field.calls, guide.calls) == ([4], [])


@each_rule
def test_scale_moves_away_from_the_guide(rule):
    x, t = batch()
    guided = rule(lambda x, t: 3 * x, lambda x, t: x, 2.0)
    torch.testing.assert_close(guided(x, t), 5 * x)


@each_rule
def test_outside_the_interval_only_the_field_is_evaluated(rule):
    field, guide = Recorded(lambda x, t: 3 * x), Recorded(lambda x, t: x)
    guided = rule(field, guide, 2.0, interval=(0.25, 0.5))
    x, _ = batch()
    for time, factor in [(0.0, 3), (0.2, 3), (0.25, 5), (0.4, 5), (0.5, 5), (0.51, 3), (1.0, 3)]:
        torch.testing.assert_close(guided(x, torch.full((4,), time)), factor * x)
    assert (len(field.calls), len(guide.calls)) == (7, 3)


@each_rule
def test_times_of_one_batch_may_lie_on_both_sides(rule):
    guided = rule(lambda x, t: 3 * x, lambda x, t: x, 2.0, interval=(0.25, 0.5))
    x, _ = batch()
    expected = torch.stack([3 * x[0], 5 * x[1], 5 * x[2], 3 * x[3]])
    torch.testing.assert_close(guided(x, torch.tensor([0.0, 0.3, 0.5, 0.9])), expected)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.6)])
def test_one_doubled_batch_equals_two_evaluations(interval):
    network, labels = Network(), torch.tensor([0, 2, 1, 0])
    x, t = batch()
    t[1] = 0.5
    recorded = Recorded(network)
    doubled = classifier_free_by_label(recorded, labels, null_label=3, scale=2.0, interval=interval)
    separate = classifier_free(
        lambda x, t: network(x, t, labels), lambda x, t: network(x, t, torch.full((4,), 3)), 2.0, interval
    )
    torch.testing.assert_close(doubled(x, t), separate(x, t), rtol=1e-6, atol=1e-6)
    assert recorded.calls == [8]


def test_doubled_batch_is_not_doubled_where_guidance_does_not_act():
    recorded, labels = Recorded(Network()), torch.tensor([0, 2, 1, 0])
    x, _ = batch()
    classifier_free_by_label(recorded, labels, 3, scale=2.0, interval=(0.5, 1.0))(x, torch.zeros(4))
    classifier_free_by_label(recorded, labels, None, scale=1.0)(x, torch.zeros(4))
    assert recorded.calls == [4, 4]


def test_guidance_without_a_null_label_is_refused():
    with pytest.raises(ValueError, match="guidance needs a null label"):
        classifier_free_by_label(Network(), torch.zeros(4, dtype=torch.int64), None, scale=2.0)


@each_rule
@pytest.mark.parametrize("scale", [-0.5, float("nan"), float("inf")])
def test_a_bad_scale_is_named(rule, scale):
    with pytest.raises(ValueError, match=f"scale must be finite and at least 0, got {scale}"):
        rule(lambda x, t: x, lambda x, t: x, scale)


@each_rule
@pytest.mark.parametrize("interval", [(-0.1, 0.5), (0.5, 0.5), (0.7, 0.2), (0.5, 1.5)])
def test_a_bad_interval_is_named(rule, interval):
    with pytest.raises(ValueError, match=rf"got \({interval[0]}, {interval[1]}\)"):
        rule(lambda x, t: x, lambda x, t: x, 2.0, interval)
