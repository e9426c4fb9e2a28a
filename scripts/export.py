"""Export a model: ``python scripts/export.py --checkpoint runs/NAME [--out FOLDER ...]``; see ``--help``."""

import sys

from fmlit.cli.export import export
from fmlit.cli.options import run

if __name__ == "__main__":
    run(export, sys.argv[1:])
