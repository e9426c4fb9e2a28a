"""kill -9 at random points of one training run, resumed each time by the same command:

    python tests/faults/soak.py --kills 100 --ranks 2

The weights must end equal, in every bit, to those of a run that nothing has interrupted, and no kill may cost more than
the steps since the last checkpoint that was due. The last line says what was seen.
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
from tests.faults.jobs import RECIPE, Job, assert_same_training

INTERVAL = 5  # steps between checkpoints: 60 images in batches of 12
STEPS_PER_KILL = 12


class Soak(NamedTuple):
    """What a soak has seen: kills before the first step of an attempt and later ones, and the most steps lost."""

    early: int
    late: int
    most_lost: int


def soak(folder: Path, kills: int, ranks: int, seed: int = 0) -> Soak:
    """Raise an AssertionError where the run does not survive ``kills`` kills of all its ranks."""
    choose = random.Random(seed)
    images = str(12 * (kills * 3 * STEPS_PER_KILL + 100))  # so many that it does not end before the last kill
    folders = [folder / "whole", folder / "killed"]
    for each in folders:
        each.mkdir(parents=True)
        (each / "recipe.yaml").write_text(RECIPE)
    started = time.monotonic()
    whole = Job(folders[0], "--images", images, ranks=ranks)
    whole.wait_until(lambda job: job.rows > 1)
    start_s = time.monotonic() - started
    expected = whole.finish()

    early = most_lost = 0
    for kill in range(kills):
        job = Job(folders[1], "--images", images, ranks=ranks)
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
    assert_same_training(Job(folders[1], "--images", images, ranks=ranks).finish(), expected)
    return Soak(early, kills - early, most_lost)


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
        f"weights, averages and optimizer equal to the uninterrupted run's; at most {seen.most_lost} steps lost, with "
        f"a checkpoint every {INTERVAL}; {time.monotonic() - started:.0f} s"
    )
