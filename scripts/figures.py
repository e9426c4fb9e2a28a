"""Draw the pictures of the documentation, from a clone; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the clone, which alone holds docs/draw

from docs.draw.command import figures
from fmlit.cli.options import run

if __name__ == "__main__":
    run(figures, sys.argv[1:])
