"""Draw samples: ``python scripts/sample.py --checkpoint runs/NAME [--n 100 --labels 3,7 ...]``; see ``--help``."""

import sys

from fmlit.cli.options import run
from fmlit.cli.sample import sample

if __name__ == "__main__":
    run(sample, sys.argv[1:])
