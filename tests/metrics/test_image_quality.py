"""All metrics of a stream: the right numbers under the right names, and no number for the wrong input."""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fmlit.core.tensors import to_uint8
from fmlit.metrics import (
    GaussianStatistics,
    ImageQuality,
    NetworkFeatures,
    PixelFeatures,
    frechet_distance,
    kernel_distance,
    precision_recall,
    reference_statistics,
)
from fmlit.metrics.bottom_k import BottomKSample, image_keys
from fmlit.metrics.image_quality import quantize
from fmlit.metrics.reference import KEPT


def pictures(n: int, seed: int, top: int = 256, size: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, (n, 1, size, size), dtype=torch.uint8, generator=g)


def reference_of(images: Tensor, cache, features=None, split: str = "train", kept: int = KEPT, **options):
    dataset = [(image, 0) for image in images]
    with mock.patch("fmlit.metrics.reference.KEPT", kept):
        return reference_statistics(dataset, f"{images.sum()}", features or PixelFeatures(), split, cache, **options)


def distance(a: Tensor, b: Tensor) -> float:
    both = [GaussianStatistics(), GaussianStatistics()]
    for statistics, images in zip(both, (a, b), strict=True):
        statistics.update(PixelFeatures()(images))
    return frechet_distance(*both)


def test_one_pass_gives_every_metric_under_its_count(tmp_path):
    real, fake = pictures(300, 1), pictures(200, 2, top=230)
    quality = ImageQuality(PixelFeatures(), reference_of(real, tmp_path), ("fid", "kid", "precision", "recall"))
    for batch in fake.split(64):
        quality.update(batch)
    scores = quality.reduce().compute()
    assert list(scores) == ["fd_pixels_200", "kd_pixels_200", "precision_pixels_200", "recall_pixels_200"]
    x, y = PixelFeatures()(fake), PixelFeatures()(real)
    assert scores["fd_pixels_200"] == pytest.approx(distance(fake, real), rel=1e-9)
    assert scores["kd_pixels_200"] == pytest.approx(kernel_distance(x, y), rel=1e-9)
    subset = quality.references[0].features[:200]  # equal counts, of a random subset of the real images
    assert (scores["precision_pixels_200"], scores["recall_pixels_200"]) == precision_recall(x, subset)
    assert str(quality.protocol("ema", "heun18")) == "fdpixels200-train-uint8-ema-heun18"


def test_names_of_inception_are_the_fields(tmp_path):
    features = PixelFeatures()
    features.name, features.preprocessing = "inception", "tf1resize"
    quality = ImageQuality(features, reference_of(pictures(100, 1), tmp_path, features))
    quality.update(pictures(1000, 2))
    assert list(quality.reduce().compute()) == ["fid_1k", "kid_100"]  # the reference keeps 100
    assert str(quality.protocol("ema", "heun18")) == "fid1k-train-tf1resize-uint8-ema-heun18"


def test_train_and_test_are_compared_in_one_pass(tmp_path):
    train, test = pictures(100, 1), pictures(90, 2)
    references = [reference_of(train, tmp_path), reference_of(test, tmp_path, split="test")]
    quality = ImageQuality(PixelFeatures(), references, ("fid",))
    quality.update(train[:80])  # a generator that has learnt its training images by heart
    scores = quality.reduce().compute()
    assert scores.keys() == {"fd_pixels_80", "fd_pixels_80_test"}
    assert scores["fd_pixels_80"] < 0.5 * scores["fd_pixels_80_test"]
    with pytest.raises(ValueError, match="two references of the same split"):
        ImageQuality(PixelFeatures(), [references[0], references[1], references[1]])


def test_scores_do_not_depend_on_order_or_batches(tmp_path):
    reference = reference_of(pictures(60, 1), tmp_path, kept=40)
    fake, results = pictures(150, 2), []
    for images, batch in ((fake, 150), (fake.flip(0), 7)):
        quality = ImageQuality(PixelFeatures(), reference, ("fid", "kid", "precision", "recall"))
        for part in images.split(batch):
            quality.update(part)
        results.append((quality.digest, quality.reduce().compute()))
    assert results[0][0] == results[1][0]
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-9)
    assert set(results[0][1]) >= {"fd_pixels_150", "kd_pixels_40", "recall_pixels_40"}
    other = ImageQuality(PixelFeatures(), reference)
    other.update(fake[:-1])
    assert other.digest != results[0][0]


def test_a_bottom_k_sample_is_a_uniform_sample_of_any_order():
    images = pictures(1000, 3)
    keys, rows = image_keys(images), torch.arange(1000.0)[:, None]
    assert len(keys.unique()) == 1000
    drawn = []
    for order in (torch.arange(1000), torch.randperm(1000, generator=torch.Generator().manual_seed(0))):
        sample = BottomKSample(100)
        for part in order.split(33):
            sample.update(keys[part], rows[part])
        drawn.append(sample.rows)
    assert torch.equal(*drawn)
    counts = torch.histc(drawn[0], bins=4, min=0, max=1000)
    assert ((counts - 25).square() / 25).sum() < 16.3  # chi squared with 3 degrees of freedom, p = 0.001


def test_too_few_images_for_a_full_rank_covariance_are_warned_of(tmp_path):
    quality = ImageQuality(PixelFeatures(), reference_of(pictures(60, 1), tmp_path), ("fid",))
    quality.update(pictures(16, 2))  # 16 pixels: a covariance of rank 15
    with pytest.warns(UserWarning, match="from 16 images in 16 dimensions: the covariance is rank-deficient"):
        quality.compute()
    quality.update(pictures(1, 3))
    quality.compute()  # no warning: warnings are errors here
    short = ImageQuality(PixelFeatures(), reference_of(pictures(9, 1), tmp_path), ("fid",))
    short.update(pictures(100, 2))
    with pytest.warns(UserWarning, match="from 9 images"):
        short.compute()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 1, 4, 4), torch.nan), "hold NaN or infinite values"),
        (torch.full((2, 1, 4, 4), torch.inf), "hold NaN or infinite values"),
        (torch.zeros(2, 1, 4, 4), r"got torch.float32 .*to_uint8 converts"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), r"got torch.int64"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), r"\(B, C, H, W\), got torch.uint8 of shape \(2, 4, 4\)"),
        (torch.zeros(2, 1, 5, 5, dtype=torch.uint8), r"5x5 pixels and the reference's 4x4"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"features must be \(B, 16\), got \(2, 48\)"),
    ],
)
def test_what_is_no_image_is_refused_and_not_counted(tmp_path, images, message):
    quality = ImageQuality(PixelFeatures(), reference_of(pictures(60, 1), tmp_path))
    quality.update(pictures(20, 2))
    with pytest.raises(ValueError, match=message):
        quality.update(images)
    assert quality.count == 20
    before = quality.digest
    quality.update(pictures(0, 2))  # nothing is no mistake
    assert (quality.count, quality.digest) == (20, before)


def test_samples_of_another_range_are_warned_of_and_not_silently_clamped():
    g = torch.Generator().manual_seed(0)
    samples = 0.4 * torch.randn(4, 3, 16, 16, generator=g)  # all but a few within [-1, 1], as samples are
    assert torch.equal(quantize(samples), to_uint8(samples))  # no warning: warnings are errors here
    for wrong in (127.5 * samples + 127.5, 5 * samples):
        with pytest.warns(UserWarning, match=r"more than 1% of the samples' values lie beyond \+-1\.5 and are clamped"):
            assert torch.equal(quantize(wrong), to_uint8(wrong))
    for bad in (torch.nan, torch.inf):
        samples[0, 0, 0, 0] = bad
        with pytest.raises(ValueError, match="hold NaN or infinite values"):
            quantize(samples)


def test_images_that_were_cast_before_they_were_scaled_are_warned_of(tmp_path):
    reference = reference_of(pictures(60, 1), tmp_path)
    quality = ImageQuality(PixelFeatures(), reference, ("fid",))
    quality.update(pictures(40, 2, top=2))
    with pytest.warns(UserWarning, match="brighter than 1 of 255: were images in .* cast to uint8"):
        quality.reduce().compute()


def test_too_few_images_give_no_number(tmp_path):
    reference = reference_of(pictures(60, 1), tmp_path)
    for n in (0, 1):
        quality = ImageQuality(PixelFeatures(), reference)
        quality.update(pictures(n, 2))
        with pytest.raises(ValueError, match=f"at least 2 generated images, got {n}"):
            quality.reduce().compute()
    quality = ImageQuality(PixelFeatures(), reference, ("recall",))
    quality.update(pictures(3, 2))
    with pytest.raises(ValueError, match="k = 3 need more images, got 3 and 3"):
        quality.compute()


def test_metrics_that_are_not_offered_are_refused_by_name(tmp_path):
    reference = reference_of(pictures(60, 1), tmp_path)
    for name in ("inception_score", "IS", "isc"):
        with pytest.raises(
            ValueError, match=f"'{name}' is not offered: the Inception Score needs the network's logits"
        ):
            ImageQuality(PixelFeatures(), reference, (name,))
    with pytest.raises(ValueError, match="unknown metric 'lpips': choose from fid, kid, precision, recall"):
        ImageQuality(PixelFeatures(), reference, ("fid", "lpips"))
    with pytest.raises(ValueError, match="no metrics"):
        ImageQuality(PixelFeatures(), reference, ())


def test_a_reference_of_other_features_or_sizes_is_refused(tmp_path):
    reference = reference_of(pictures(60, 1), tmp_path)
    network = NetworkFeatures(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), "net")
    with pytest.raises(ValueError, match=r"reference train holds pixels features \(weights none\).* net features"):
        ImageQuality(network, reference)
    theirs = reference_of(pictures(60, 1), tmp_path, network)
    with torch.no_grad():
        network.module[1].bias += 1
    with pytest.raises(ValueError, match=r"reference train holds net features \(weights \w{12}\)"):
        ImageQuality(NetworkFeatures(network.module, "net"), theirs)
    larger = reference_of(pictures(60, 1, size=5), tmp_path, split="test")
    with pytest.raises(ValueError, match="references of different image sizes"):
        ImageQuality(PixelFeatures(), [reference, larger])
    with pytest.raises(ValueError, match="at least one reference"):
        ImageQuality(PixelFeatures(), [])


def test_reduced_metrics_take_no_more_images(tmp_path):
    quality = ImageQuality(PixelFeatures(), reference_of(pictures(60, 1), tmp_path))
    quality.update(pictures(20, 2))
    once = quality.reduce().compute()
    assert quality.reduce().compute() == once
    with pytest.raises(RuntimeError, match="new ImageQuality"):
        quality.update(pictures(20, 3))


pytestmark = pytest.mark.filterwarnings("error")
