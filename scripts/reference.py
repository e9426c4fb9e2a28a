"""Compute the statistics of real images: the same as ``fmlit reference``; see ``--help``."""

import sys

from fmlit.cli.main import main

if __name__ == "__main__":
    main(["reference", *sys.argv[1:]])
