"""kill -9 at random points of one training run, resumed each time by the same command:

    python tests/faults/soak.py --kills 100 --ranks 2

The run draws samples and scores them as well. Its weights, metrics.csv, pictures and best.ckpt must end equal, in every
bit, to those of a run that nothing has interrupted, and no kill may cost more than the steps since the last checkpoint
that was due. The last line says what was seen.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script

from fmlit.storage.checkpoints import load, newest_valid
from fmlit.storage.run_folder import RunFolder
from fmlit.training.loggers import read_rows
from tests.faults.jobs import RECIPE, Job, assert_same_training

INTERVAL = 5  # steps between checkpoints: 60 images in batches of 12
STEPS_PER_KILL = 12
# At other steps than checkpoints, and some at the same.
OPTIONS = ("--samples.every=84", "--samples.columns=2", "--samples.sampler.steps=3", "--quality.every=108")
OPTIONS += ("--quality.n=20", "--quality.metrics=[fid]", "--quality.batch_size=10")
OF_TIME = "images_per_second"  # the column of metrics.csv that never repeats


class Soak(NamedTuple):
    """What a soak has seen: kills before the first step of an attempt and later ones, and the most steps lost."""

    early: int
    late: int
    most_lost: int


def soak(folder: Path, kills: int, ranks: int, seed: int = 0) -> Soak:
    """Raise an AssertionError where the run does not survive ``kills`` kills of all its ranks."""
    choose = random.Random(seed)
    images = 12 * (kills * 3 * STEPS_PER_KILL + 100)  # so many that it does not end before the last kill
    options = (f"--images={images}", f"--quality.cache={folder / 'statistics'}", *OPTIONS)
    folders = [folder / "whole", folder / "killed"]
    for each in folders:
        each.mkdir(parents=True)
        (each / "recipe.yaml").write_text(RECIPE)
    started = time.monotonic()
    whole = Job(folders[0], *options, ranks=ranks)
    whole.wait_until(lambda job: job.rows > 1)
    start_s = time.monotonic() - started
    expected = whole.finish()

    early = most_lost = 0
    for kill in range(kills):
        job = Job(folders[1], *options, ranks=ranks)
        steps = choose.randrange(STEPS_PER_KILL)
        if steps:
            done = _step_of_newest(job.run)
            job.wait_until(lambda job, wanted=done + steps: job.rows > wanted)
            time.sleep(choose.uniform(0, 0.05))  # somewhere in a step, or in a save
        else:
            early += 1
            time.sleep(choose.uniform(0, start_s))
        victims = choose.choice(
            [(), *((rank,) for rank in range(ranks))]
        )  # all at once, or one that takes the rest along
        job.signal(signal.SIGKILL, *victims)
        job.outcomes()
        lost = max(0, job.rows - 1) - _step_of_newest(job.run)
        most_lost = max(most_lost, lost)
        assert lost <= INTERVAL, f"kill {kill + 1} lost {lost} steps"
    killed = Job(folders[1], *options, ranks=ranks)
    assert_same_training(killed.finish(), expected)
    assert_same_results(RunFolder(killed.run), RunFolder(whole.run))
    return Soak(early, kills - early, most_lost)


def assert_same_results(a: RunFolder, b: RunFolder) -> None:
    """That two runs have logged the same numbers, drawn the same pictures, and found the same best checkpoint."""
    rows = [[{**row, OF_TIME: ""} for row in read_rows(run.metrics)] for run in (a, b)]
    assert len(rows[0]) == len(rows[1]) > 0
    for one, other in zip(*rows, strict=True):
        assert one == other
    pictures = [{file.name: file.read_bytes() for file in run.samples.iterdir()} for run in (a, b)]
    assert pictures[0].keys() == pictures[1].keys() != set()
    assert [name for name in pictures[0] if pictures[0][name] != pictures[1][name]] == []
    best = [load(run.best) for run in (a, b)]
    assert_same_training(*best)
    curves = [next(state for key, state in each["callbacks"].items() if "QualityCurve" in key) for each in best]
    assert curves[0] == curves[1]
    assert curves[0]["best"] is not None
    kept = [sorted(file.name for file in run.checkpoints.iterdir()) for run in (a, b)]
    assert kept[0] == kept[1]


def _step_of_newest(run: Path) -> int:
    checkpoints = run / "checkpoints"
    return load(newest_valid(checkpoints))["global_step"] if any(checkpoints.glob("*.ckpt")) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    started = time.monotonic()
    seen = soak(scratch, **vars(options))
    shutil.rmtree(scratch)
    print(
        f"soak: {options.kills} kills of {options.ranks} process(es), {seen.early} of them while starting; final "
        f"weights, metrics, pictures and best checkpoint equal to the uninterrupted run's; at most {seen.most_lost} "
        f"steps lost, with a checkpoint every {INTERVAL}; {time.monotonic() - started:.0f} s"
    )
