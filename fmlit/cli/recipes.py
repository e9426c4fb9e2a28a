"""Recipes: the YAML files that ``--config`` names, and where they are found."""

import difflib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import fmlit
from fmlit.core.errors import UserError

FOLDER = Path(fmlit.__file__).parent / "configs"  # in a clone a link to configs/, in the wheel a copy of it
QUICKSTART = FOLDER / "quickstart.yaml"


def names() -> list[str]:
    """The names of the recipes that come with fmlit."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file that ``--config NAME`` stands for.

    It is the first of these that exists: the file ``NAME``, the file ``NAME.yaml``, and the recipe of that name that
    comes with fmlit, where ``.yaml`` may be left out too.

    Raises:
        UserError: there is none. The message suggests a name that is close.
    """
    path = Path(name)
    shipped = [FOLDER / name, FOLDER / f"{name}.yaml"] if path.name == name else []
    for candidate in (path, Path(f"{name}.yaml"), *shipped):
        if candidate.is_file():
            return candidate
    if path.exists():  # a pipe, which can be read; or a folder, which whoever reads it refuses
        return path
    raise UserError(f"config: cannot read {name} (No such file or directory){_hint(path)}")


def resolve(args: Sequence[str]) -> list[str]:
    """A command line in which every configuration is ``--config=FILE``, where FILE exists."""
    resolved, rest = [], iter(args)
    for arg in rest:
        option, _, name = arg.partition("=")
        if option in ("-c", "--config") and (name := name or next(rest, "")):
            arg = f"--config={find_recipe(name)}"
        resolved.append(arg)
    return resolved


def config_files(args: Sequence[str]) -> list[Path]:
    """The files that a command line names with ``--config``."""
    apart = [value for option, value in pairwise(args) if option in ("-c", "--config")]
    joined = [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    return [Path(path) for path in (*apart, *joined)]


def _hint(path: Path) -> str:
    """Of the files beside the missing one or of fmlit's recipes, the one that may have been meant."""
    beside = {other.name: str(other) for other in path.parent.glob("*.yaml")}
    known = {**{name: name for name in names()}, **beside}
    for name in (path.name, path.stem):
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
            return f"; did you mean {known[near[0]]}?"
    return f"; the recipes of fmlit are {', '.join(names())}"
