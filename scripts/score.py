"""Score pictures of any origin: the same as ``fmlit score``; see ``--help``."""

import sys

from fmlit.cli.main import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
