"""Score a model: ``python scripts/evaluate.py --checkpoint runs/NAME [--n 50000 ...]``; see ``--help``."""

import sys

from fmlit.commands import run
from fmlit.evaluation import evaluate

if __name__ == "__main__":
    run(evaluate, sys.argv[1:])
