"""Measure speed against a bare loop and other packages, from a clone; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the clone, which alone holds the benchmarks

from benchmarks.command import benchmark
from fmlit.cli.options import run

if __name__ == "__main__":
    run(benchmark, sys.argv[1:])
