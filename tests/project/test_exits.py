"""Only the command line ends the program: whoever calls a function of fmlit from Python gets an exception."""

import ast
from pathlib import Path

import pytest

import fmlit

PACKAGE = Path(fmlit.__file__).parent
FOLDERS = [folder for folder in fmlit.FOLDERS if (PACKAGE / folder).is_dir()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_function_below_the_command_line_ends_the_program(folder: str) -> None:
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            raised = node.exc if isinstance(node, ast.Raise) else node if isinstance(node, ast.Call) else None
            called = ast.unparse(raised.func if isinstance(raised, ast.Call) else raised) if raised else ""
            assert called not in ("SystemExit", "sys.exit", "exit", "quit", "os._exit"), f"{path}:{node.lineno}"
