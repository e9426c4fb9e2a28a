"""Draw samples: the same as ``fmlit sample``; see ``--help``."""

import sys

from fmlit.cli.main import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
