"""Export a model: ``python scripts/export.py --checkpoint runs/NAME [--out FOLDER ...]``; see ``--help``."""

import sys

from fmlit.commands import run
from fmlit.export import export

if __name__ == "__main__":
    run(export, sys.argv[1:])
