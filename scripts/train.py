"""Train a generator: ``python scripts/train.py [--config configs/NAME.yaml] [--key value ...]``; see ``--help``."""

import sys
from pathlib import Path

from fmlit.cli.train import train

if __name__ == "__main__":
    train(sys.argv[1:], default_config=Path(__file__).parent.parent / "configs" / "quickstart.yaml")
