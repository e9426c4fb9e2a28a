"""Export a model: the same as ``fmlit export``; see ``--help``."""

import sys

from fmlit.cli.main import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
