"""``fmlit COMMAND``: the front door to every command. ``python scripts/COMMAND.py`` is the same."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import fmlit
from fmlit.cli import recipes
from fmlit.cli.output import lossy_output
from fmlit.core.errors import INTERRUPTED

# What each command does. It is the function of that name in the module of that name, imported when it is used.
COMMANDS = {
    "train": "train a generator by a recipe; without --config, the quickstart",
    "sample": "draw samples of a trained model",
    "evaluate": "score a trained model by FID, KID, precision and recall",
    "score": "score anybody's pictures against a data set",
    "reference": "compute the statistics of real images, and cache them",
    "export": "write a trained model into a folder for others to use",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names, with the options that follow it.

    Args:
        args: the command line without the name of the program; by default that of this process.
    """
    with lossy_output():
        _main(sys.argv[1:] if args is None else args)


def _main(args: Sequence[str]) -> None:
    name, *options = args or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"fmlit {fmlit.__version__}")
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "fmlit --help lists them"
        print(f"error: there is no command {name}; {hint}", file=sys.stderr)
        raise SystemExit(2)
    else:
        try:
            _run(name, options)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None


def _run(name: str, options: Sequence[str]) -> None:
    """Usage lines name the program as the user started it: ``fmlit train`` or ``train.py``."""
    script = Path(sys.argv[0]).name
    program = script if script == f"{name}.py" else f"fmlit {name}"
    command = getattr(import_module(f"fmlit.cli.{name}"), name)
    if name == "train":  # its options are those of the classes that a recipe names
        command(options, program=program)
    else:
        import_module("fmlit.cli.options").run(command, options, program)


def _help() -> str:
    commands = "\n".join(f"  {name:11}{summary}" for name, summary in COMMANDS.items())
    return f"""usage: fmlit COMMAND [--KEY VALUE ...]

{(fmlit.__doc__ or "").splitlines()[0]}

commands:
{commands}

recipes, for fmlit train --config NAME:
  {", ".join(recipes.names())}

fmlit COMMAND --help lists the options of a command; fmlit --version prints the version."""
