"""The distances themselves, against closed forms and against the established implementations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from fmlit.metrics import (
    ClassReader,
    GaussianStatistics,
    Protocol,
    frechet_distance,
    kernel_distance,
    nearest_neighbors,
    precision_recall,
)
from fmlit.metrics.protocol import count_label, metric_key


def draw(n: int, d: int, seed: int = 0, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """Correlated features with a spectrum that falls over three decades."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(d)) / math.sqrt(d)
    spectrum = torch.logspace(0, -3, d)
    return offset + scale * (torch.randn(n, d, generator=g) * spectrum) @ mixing


def statistics(features: Tensor, batch: int = 64) -> GaussianStatistics:
    result = GaussianStatistics()
    for part in features.split(batch):
        result.update(part)
    return result


class Flatten(nn.Module):
    num_features = 48

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 255


@settings(max_examples=30)
@given(
    n=st.integers(2, 200),
    d=st.integers(1, 12),
    batch=st.integers(1, 70),
    offset=st.sampled_from([0.0, 1.0, -300.0, 1e5, 1e7]),
)
def test_streamed_covariance_is_the_two_pass_one_whatever_the_offset(n, d, batch, offset):
    features = draw(n, d).double() + offset
    result = statistics(features, batch)
    mean = features.mean(dim=0)
    expected = (features - mean).T @ (features - mean) / (n - 1)
    assert result.count == n
    assert (result.mean - mean).abs().max() <= 1e-12 * (1 + abs(offset))
    rounded = torch.finfo(torch.float64).eps * abs(offset)  # of the features, and so of both covariances
    assert (result.covariance - expected).norm() <= (1e-9 + 2 * rounded) * expected.norm() + 1e-300


def test_a_sum_of_squares_would_fail_the_same_claim():
    features = draw(500, 8).double() + 1e5
    raw = (features.T @ features - 500 * torch.outer(features.mean(0), features.mean(0))) / 499
    assert (raw - torch.cov(features.T)).norm() > 1e-9 * torch.cov(features.T).norm()


def test_frechet_distance_of_known_gaussians():
    class Known:
        def __init__(self, mean: list[float], variances: list[float], angle: float) -> None:
            c, s = math.cos(angle), math.sin(angle)
            turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
            self.mean = torch.tensor(mean).double()
            self.covariance = turn @ torch.diag(torch.tensor(variances).double()) @ turn.T

    a, b = Known([0, 0], [4.0, 9.0], 0.7), Known([3, 4], [1.0, 16.0], 0.7)  # the same axes: covariances commute
    assert frechet_distance(a, b) == pytest.approx(25 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-12)
    flat = Known([0, 0], [4.0, 0.0], 0.3)  # rank 1
    assert frechet_distance(flat, Known([0, 0], [0.0, 4.0], 0.3)) == pytest.approx(8.0, rel=1e-12)
    turned = Known([0, 0], [4.0, 0.0], 0.3 + math.pi / 3)
    assert frechet_distance(flat, turned) == pytest.approx(8 - 8 * math.cos(math.pi / 3), rel=1e-12)


@pytest.mark.parametrize("n", [30, 4000])  # fewer and more images than dimensions
def test_frechet_distance_is_that_of_torch_fidelity(n):
    a, b = draw(n, 64, seed=1), draw(5000, 64, seed=2, scale=1.1, offset=0.05)
    expected = fid_statistics_to_metric(
        fid_features_to_statistics(a.double()), fid_features_to_statistics(b.double()), False
    )["frechet_inception_distance"]
    forward = frechet_distance(statistics(a), statistics(b))
    backward = frechet_distance(statistics(b), statistics(a))
    assert forward == pytest.approx(expected, rel=1e-6)
    assert backward == pytest.approx(forward, rel=1e-9)


def test_frechet_distance_is_that_of_torchmetrics():
    g = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (300, 3, 4, 4), generator=g, dtype=torch.uint8)
    fake = torch.randint(0, 200, (250, 3, 4, 4), generator=g, dtype=torch.uint8)
    metric = FrechetInceptionDistance(Flatten()).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = frechet_distance(statistics(Flatten()(fake)), statistics(Flatten()(real)))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-6)


@pytest.mark.parametrize("n", [20, 500])
def test_equal_sets_are_at_distance_zero(n):
    a = statistics(draw(n, 64, offset=10.0))
    assert 0 <= frechet_distance(a, a) < 1e-10 * a.covariance.trace()


def test_statistics_name_what_is_wrong():
    result = GaussianStatistics()
    with pytest.raises(ValueError, match="statistics of 0 images"):
        result.mean  # noqa: B018
    result.update(draw(1, 4))
    with pytest.raises(ValueError, match="statistics of 1 images: at least 2"):
        result.covariance  # noqa: B018
    with pytest.raises(ValueError, match=r"\(B, 4\), got \(2, 5\)"):
        result.update(draw(2, 5))
    with pytest.raises(ValueError, match="NaN or infinite"):
        result.update(torch.full((2, 4), torch.nan))
    assert result.count == 1
    poisoned = statistics(draw(9, 4))
    poisoned._mean[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        frechet_distance(poisoned, statistics(draw(9, 4)))
    with pytest.raises(ValueError, match="different dimensions: 4 and 5"):
        frechet_distance(statistics(draw(9, 4)), statistics(draw(9, 5)))


def test_statistics_begun_in_inference_mode_go_on_outside_of_it():
    result, features = GaussianStatistics(), draw(60, 5)
    with torch.inference_mode():
        result.update(features[:30] * 1)
    result.update(features[30:])
    torch.testing.assert_close(result.covariance, torch.cov(features.double().T))


@pytest.mark.filterwarnings("ignore:.*save all extracted features")
def test_kernel_distance_is_that_of_torchmetrics():
    g = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, top, (200, 3, 4, 4), generator=g, dtype=torch.uint8) for top in (256, 220))
    metric = KernelInceptionDistance(Flatten(), subsets=1, subset_size=200)  # one subset of all: no randomness left
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = kernel_distance(Flatten()(fake), Flatten()(real), chunk=77)
    assert ours == pytest.approx(metric.compute()[0].item(), rel=1e-4)  # torchmetrics sums in float32


def test_kernel_distance_counts_each_pair_once():
    x, y = torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([[0.5], [3.0]])

    def k(a, b):
        return (a * b + 1) ** 3

    within_x = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 6
    within_y = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 2
    across = sum(k(a, b) for a in x for b in y) / 6
    assert kernel_distance(x, y) == pytest.approx((within_x + within_y - 2 * across).item())
    with pytest.raises(ValueError, match="at least 2 images on each side, got 1 and 3"):
        kernel_distance(x[:1], x)
    with pytest.raises(ValueError, match="features must be"):
        kernel_distance(x, torch.zeros(3, 2))


def test_kernel_distance_is_unbiased():
    values = torch.tensor([kernel_distance(draw(40, 6, seed=i), draw(50, 6, seed=1000 + i)) for i in range(100)])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(100)
    assert (values < 0).any()


def test_precision_and_recall_of_constructed_sets():
    line = torch.arange(20.0)[:, None]
    assert precision_recall(line, line) == (1.0, 1.0)
    assert precision_recall(line + 1000, line) == (0.0, 0.0)
    # half of the generated images lie far off; the other half covers the left half of the line and 3 steps beyond it
    generated = torch.cat([line[:10], line[:10] * 100 + 1e5])
    values = precision_recall(generated, line)
    assert values == (0.5, pytest.approx(0.65))
    collapsed = line[:1].expand(20, 1) + 0.01 * torch.arange(20.0)[:, None] / 20  # one mode, repeated
    values = precision_recall(collapsed, line, k=3)
    assert values.precision == 1.0
    assert values.recall == pytest.approx(0.05)


def test_precision_and_recall_are_those_of_torch_fidelity():
    real, generated = draw(300, 10, seed=1), draw(200, 10, seed=2, scale=0.7)
    expected = calculate_precision_recall_full(generated.double(), real.double(), 3)
    assert precision_recall(generated, real, chunk=64) == pytest.approx(expected)
    with pytest.raises(ValueError, match="k = 3 need more images, got 3 and 300"):
        precision_recall(generated[:3], real)


def test_copies_lie_on_the_manifold_even_where_radii_are_zero():
    real = draw(30, 8, offset=100.0)[torch.arange(60) % 30].repeat(2, 1)  # every image four times: all radii are 0
    assert precision_recall(real[:30], real) == (1.0, 1.0)


def test_nearest_neighbours_find_the_copy():
    members = draw(100, 12, offset=50.0)
    found = nearest_neighbors(members[[7, 42]], members, k=3, chunk=1)
    assert found.indices[:, 0].tolist() == [7, 42]
    assert found.distances[:, 0].tolist() == [0.0, 0.0]
    expected = torch.cdist(members[[7, 42]].double(), members.double()).topk(3, largest=False)
    torch.testing.assert_close(found.distances, expected.values, atol=1e-6, rtol=1e-6)
    assert torch.equal(found.indices, expected.indices)
    with pytest.raises(ValueError, match="between 1 and the number of members 100, got 101"):
        nearest_neighbors(members, members, k=101)


def test_protocol_reads_as_in_the_literature():
    protocol = Protocol("inception", 50_000, "train", "tf1resize", weights="ema", sampler="heun18")
    assert str(protocol) == "fid50k-train-tf1resize-uint8-ema-heun18"
    assert str(Protocol("inception", 1001, "test", "tf1resize", flip=True)) == "fid1001-test+flip-tf1resize-uint8"
    assert (
        str(Protocol("pixels", 1000, "train", weights="ema", sampler="heun18")) == "fdpixels1k-train-uint8-ema-heun18"
    )
    assert str(Protocol("dino2", 5000, "train")) == "fddino2-5k-train-uint8"
    with pytest.raises(ValueError, match=r"Protocol\.sampler .* got 'heun-18'"):
        Protocol("inception", 10, "train", sampler="heun-18")
    with pytest.raises(ValueError, match=r"Protocol\.n must be positive, got 0"):
        Protocol("inception", 0, "train")


def test_metric_names_carry_their_count_and_their_features():
    assert [count_label(n) for n in (999, 1000, 1001, 5000, 49_664, 50_000)] == [
        "999",
        "1k",
        "1001",
        "5k",
        "49664",
        "50k",
    ]
    assert metric_key("fid", "inception", 5000) == "fid_5k"
    assert metric_key("fid", "pixels", 1000) == "fd_pixels_1k"
    assert metric_key("kid", "pixels", 1000) == "kd_pixels_1k"
    assert metric_key("recall", "inception", 1000) == "recall_1k"
    assert metric_key("recall", "pixels", 1000) == "recall_pixels_1k"


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(np.round(data.images * 255 / 16).astype(np.uint8))[:, None]
    return images, torch.from_numpy(data.target).long()


def test_class_reader_reads_digits(digits):
    images, labels = digits
    reader = ClassReader(images, labels)
    assert reader.accuracy > 0.98
    assert (reader.read(images) == labels).float().mean() > 0.99
    half = torch.cat([images[:500], images.roll(4, dims=-1)[:500]])  # wrapped around: few of these read as themselves
    assert 0.5 < (reader.read(half) == torch.cat([labels[:500]] * 2)).float().mean() < 0.8
    with pytest.raises(ValueError, match=r"\(1, 16, 16\); this reader knows \(1, 8, 8\)"):
        reader.read(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\)"):
        ClassReader(images[:3], labels[:2])
    with pytest.raises(ValueError, match="expected uint8"):
        reader.read(images.float())
