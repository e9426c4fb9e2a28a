"""``python -m fmlit COMMAND``: the same as ``fmlit COMMAND``."""

from fmlit.cli.main import main

if __name__ == "__main__":
    main()
