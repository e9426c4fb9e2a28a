"""The front door: every public name loads, on first use, under the name that recipes and checkpoints say."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import fmlit

SOURCE = Path(fmlit.__file__).read_text()


@pytest.mark.parametrize("name", fmlit.PUBLIC)
def test_every_public_name_is_what_its_module_defines(name: str) -> None:
    found = getattr(fmlit, name)
    assert found is getattr(import_module(fmlit.PUBLIC[name]), name)
    assert (found.__module__, found.__name__) == (fmlit.PUBLIC[name], name)  # defined there, not only found there


def test_type_checkers_see_the_same_names() -> None:
    (block,) = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == fmlit.PUBLIC
    assert all(alias.asname == alias.name for node in block.body for alias in node.names)
    assert (Path(fmlit.__file__).parent / "py.typed").exists()


def test_folders_and_names_are_listed_and_unknown_ones_refused() -> None:
    assert {"UNet", "CondOTPath", "solvers", "__version__"} <= set(dir(fmlit))
    assert fmlit.solvers.euler is import_module("fmlit.solvers").euler
    with pytest.raises(AttributeError, match="has no attribute 'Unet'"):
        fmlit.Unet  # noqa: B018


def test_importing_the_package_loads_no_library() -> None:
    code = "import sys; before = set(sys.modules); import fmlit; print(*sorted(set(sys.modules) - before))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.split(".")[0] for name in ended.stdout.split()} <= {"fmlit", *sys.stdlib_module_names}
    assert "fmlit." not in ended.stdout
