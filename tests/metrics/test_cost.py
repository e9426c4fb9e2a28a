"""What scoring costs: the right times under the right names, the peak of memory since the start, the dearest rank."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fmlit.metrics import Cost, ImageQuality, PixelFeatures, cost, frechet, reference_statistics
from fmlit.metrics.cost import Meter

CPU = torch.device("cpu")
PICTURES = torch.randint(0, 256, (100, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class ProcessGroup:
    """Three ranks, of which this one has found the least."""

    def gather_objects(self, value):
        return [value, (9.0, 1.0, 0.0, 10**9), (8.0, 2.0, 0.5, 3 * 10**9)]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is told."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock.now)
    return clock


def test_time_is_told_by_its_parts(clock, tmp_path, monkeypatch):
    class Slow(PixelFeatures):
        def extract(self, images):
            clock.now += 3
            return super().extract(images)

    def slow_distance(*args):
        clock.now += 20
        return frechet.frechet_distance(*args)

    features = Slow()
    reference = reference_statistics([(image, 0) for image in PICTURES], "abc", features, "train", tmp_path)
    monkeypatch.setattr("fmlit.metrics.image_quality.frechet_distance", slow_distance)
    quality = ImageQuality(features, reference, ("fid",))
    for batch in PICTURES.split(25):
        clock.now += 2  # a sampler
        quality.update(batch)
    quality.reduce()
    clock.now += 1000  # whatever happens until the distances are asked for
    quality.compute()
    found = quality.cost()
    assert (found.images, found.seconds, found.features, found.distances) == (100, 20, 12, 20)
    assert found.record() == {
        "seconds_per_1000": 200.0,
        "features_per_1000": 120.0,
        "distances_seconds": 20.0,
        "peak_memory_gb": round(found.memory / 1e9, 3),
    }


def test_each_figure_is_of_the_rank_that_it_is_largest_on(clock):
    meter = Meter(CPU)
    with meter.timing("distances"):
        clock.now += 7
    found = meter.cost(500, ProcessGroup())
    assert found == Cost(500, seconds=9.0, features=2.0, distances=7.0, memory=3 * 10**9)
    assert str(found) == "18 s per 1,000 images, of which features 4 s; distances 7 s; peak memory 3.00 GB"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the whole process")
def test_memory_is_the_peak_since_the_start():
    def peak(megabytes: int) -> int:
        meter = Meter(CPU)
        torch.ones(megabytes * 250_000)
        return meter.cost(1, SimpleNamespace(gather_objects=lambda value: [value])).memory

    before, large, after = peak(0), peak(400), peak(0)
    assert large - before > 300e6
    assert large - after > 300e6


def test_memory_is_known_where_proc_is_closed(monkeypatch):
    def closed(*args):
        raise PermissionError

    before = cost._peak(CPU)
    monkeypatch.setattr(cost.Path, "write_text", closed)
    Meter(CPU)
    monkeypatch.setattr(cost.Path, "exists", lambda path: False)
    assert 0.5 < cost._peak(CPU) / before < 4
