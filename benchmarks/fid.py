"""The cost of FID: features of images, and the distance between two sets of them."""

import torch

from benchmarks.outcome import Outcome, Report
from benchmarks.rounds import now, run_rounds, spread
from benchmarks.training import built
from benchmarks.workload import Setup
from fmlit.metrics import Features, InceptionFeatures
from fmlit.metrics.frechet import GaussianStatistics, frechet_distance

BATCH = 250  # as evaluate.py


def fid(setup: Setup, images: int, features: Features | None, rounds: int, report: Report) -> Outcome:
    """Seconds per 1,000 images for features and their statistics, and seconds for one distance, in turn."""
    device = torch.device(setup.device)
    extractor = (features or InceptionFeatures()).to(device)
    with built(setup, steps=1) as cli:
        shape, size = cli.datamodule.shape, setup.batch_size or BATCH
    pictures = torch.randint(256, (images, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    extractor(pictures[: min(size, images)])  # the first use of its kernels
    statistics = [GaussianStatistics(), GaussianStatistics()]

    def extract() -> float:
        started = now(device)
        for batch in pictures.split(size):
            statistics[0].update(extractor(batch.to(device)))
        return now(device) - started

    def compare() -> float:
        started = now(device)
        frechet_distance(*statistics)
        return now(device) - started

    statistics[1].update(extractor((255 - pictures[: max(2, images // 2)]).to(device)))
    done = run_rounds({"features": extract, "distance": compare}, rounds, report.round)
    seconds = {name: [turn.seconds[name] for turn in done] for name in done[0].seconds}
    results = {name: spread("seconds", values) for name, values in seconds.items()}
    results["features"] |= spread("seconds_per_1000", [1000 * value / images for value in seconds["features"]])
    details = {
        "features": extractor.name,
        "dimension": extractor.dimension,
        "shape": list(shape),
        "images": images,
        "batch_size": size,
    }
    return Outcome(results, done, details)
