"""Train a generator: the same as ``fmlit train``; see ``--help``."""

import sys

from fmlit.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
