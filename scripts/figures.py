"""Draw the pictures of docs/course.md: ``python scripts/figures.py [--checkpoint runs/quickstart]``; see ``--help``."""

import sys

from docs.draw.command import figures
from fmlit.cli.options import run

if __name__ == "__main__":
    run(figures, sys.argv[1:])
