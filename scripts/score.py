"""Score anybody's pictures: ``python scripts/score.py --images FOLDER --data CIFAR10 [...]``; see ``--help``."""

import sys

from fmlit.cli.options import run
from fmlit.cli.score import score

if __name__ == "__main__":
    run(score, sys.argv[1:])
