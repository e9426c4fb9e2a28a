"""Compute statistics of real images: ``python scripts/reference.py --data CIFAR10 [...]``; see ``--help``."""

import sys

from fmlit.cli.options import run
from fmlit.cli.reference import reference

if __name__ == "__main__":
    run(reference, sys.argv[1:])
