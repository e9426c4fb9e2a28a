"""Draw the pictures of docs/course.md: ``python scripts/figures.py [--checkpoint runs/quickstart]``; see ``--help``."""

import sys

from fmlit.commands.options import run
from fmlit.figures.command import figures

if __name__ == "__main__":
    run(figures, sys.argv[1:])
