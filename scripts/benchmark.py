"""Measure speed against a bare loop and other packages: ``python scripts/benchmark.py``; see ``--help``."""

import sys

from benchmarks.command import benchmark
from fmlit.cli.options import run

if __name__ == "__main__":
    run(benchmark, sys.argv[1:])
