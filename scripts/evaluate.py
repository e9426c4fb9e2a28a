"""Score a model: the same as ``fmlit evaluate``; see ``--help``."""

import sys

from fmlit.cli.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
