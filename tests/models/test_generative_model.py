import pytest
import torch
from torch import nn

from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath
from fmlit.flows.predictions import PreconditionedVelocity, Velocity
from fmlit.models.generative_model import GenerativeModel
from tests.helpers.oracle import PATHS, PREDICTIONS, Oracle, oracle_model
from tests.helpers.small_runs import tiny_mlp


def mixture(seed: int = 0) -> GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    return GaussianMixture(torch.randn(3, 2, dtype=torch.float64, generator=g), [0.2, 0.5, 1.0])


def points() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(6, 2, dtype=torch.float64, generator=g), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)


class Recorded(nn.Module):
    """Keeps what it was called with."""

    def forward(self, x, t, labels):
        self.inputs, self.labels = x, labels
        return x


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
def test_all_fields_come_out_of_any_prediction(path, prediction):
    exact, (x, t) = mixture(), points()
    model = oracle_model([exact], path, prediction)
    torch.testing.assert_close(model.velocity(x, t), exact.velocity(x, path, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.score(x, t), exact.score(x, path, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.data(x, t), exact.data(x, path, t), rtol=1e-9, atol=1e-9)
    noise = -path.beta(t)[:, None] * exact.score(x, path, t)
    torch.testing.assert_close(model.noise(x, t), noise, rtol=1e-9, atol=1e-9)


def test_labels_choose_the_field_and_none_means_the_null_label():
    mixtures, (x, t), path = [mixture(seed) for seed in range(3)], points(), CondOTPath()
    model = oracle_model(mixtures, path)
    assert model.num_classes == model.null_label == 2
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    fields = torch.stack([m.velocity(x, path, t) for m in mixtures])
    torch.testing.assert_close(model.velocity(x, t, labels), fields[labels, torch.arange(6)])
    torch.testing.assert_close(model.velocity(x, t), fields[2])

    net = Recorded()
    GenerativeModel(net, path, Velocity(), (2,), num_classes=7)(x.float(), t.float())
    assert torch.equal(net.labels, torch.full((6,), 7))
    assert net.labels.dtype == torch.int64


def test_an_unconditional_network_sees_no_labels():
    net, (x, t) = Recorded(), points()
    model = GenerativeModel(net, CondOTPath(), Velocity(), (2,))
    model(x, t)
    assert net.labels is None
    assert model.null_label is None
    with pytest.raises(ValueError, match="labels were given to an unconditional model"):
        model.score(x, t, torch.zeros(6, dtype=torch.int64))


def test_the_network_sees_the_predictions_input():
    net, (x, t) = Recorded(), points()
    GenerativeModel(net, CondOTPath(), PreconditionedVelocity(0.5), (2,))(x, t)
    torch.testing.assert_close(net.inputs, x / ((0.5 * t) ** 2 + (1 - t) ** 2).sqrt()[:, None])


def test_another_network_under_the_same_model():
    (x, t), path = points(), CondOTPath()
    model = oracle_model([mixture(0)], path)
    other = model.with_net(Oracle([mixture(1)], path, Velocity()))
    torch.testing.assert_close(other.velocity(x, t), mixture(1).velocity(x, path, t))
    assert (other.path, other.prediction, other.shape) == (model.path, model.prediction, model.shape)
    net = tiny_mlp((2,))
    assert model.with_net(net).net is net


def test_device_with_and_without_weights():
    model = oracle_model([mixture()], CondOTPath())
    assert list(model.parameters()) == []
    assert model.device == torch.device("cpu")
    assert model.with_net(nn.Linear(1, 1, device="meta")).device == torch.device("meta")
    assert model.with_net(nn.BatchNorm1d(1, affine=False, device="meta")).device == torch.device("meta")


@pytest.mark.parametrize(
    ("of_net", "of_model", "message"),
    [
        (10, None, "MLP has num_classes=10, the model None"),
        (None, 10, "MLP has num_classes=None, the model 10"),
        (10, 9, "MLP has num_classes=10, the model 9"),
        (None, 0, "num_classes must be at least 1, or None .* got 0"),
    ],
)
def test_class_counts_that_do_not_fit_are_refused(of_net, of_model, message):
    with pytest.raises(ValueError, match=message):
        GenerativeModel(tiny_mlp((2,), of_net), CondOTPath(), Velocity(), (2,), of_model)
