"""Score a model: ``python scripts/evaluate.py --checkpoint runs/NAME [--n 50000 ...]``; see ``--help``."""

import sys

from fmlit.cli.evaluate import evaluate
from fmlit.cli.options import run

if __name__ == "__main__":
    run(evaluate, sys.argv[1:])
