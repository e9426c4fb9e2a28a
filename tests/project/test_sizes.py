"""How large files, functions and signatures of the package may be: what a reader can take in at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fmlit"
FILES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}

FILE_LINES = 300
FUNCTION_LINES = 60
CONSTRUCTOR_ARGUMENTS = 12
PARAMETERS = 15


def fields(node: ast.ClassDef) -> int:
    """The number of fields of a dataclass, those that it inherits left out; 0 for any other class."""
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return 0
    annotated = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    return sum("ClassVar" not in ast.unparse(item.annotation) for item in annotated)


def too_large(source: str) -> Iterator[str]:
    """What exceeds a limit: the name, and the number that is too high."""
    if (lines := len(source.splitlines())) > FILE_LINES:
        yield f"file of {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and (count := fields(node)) > CONSTRUCTOR_ARGUMENTS:
            yield f"{node.name} of {count} fields"
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES:
            yield f"{node.name} of {lines} lines"
        count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
        if count > PARAMETERS:
            yield f"{node.name} of {count} parameters"
        if node.name == "__init__" and count - 1 > CONSTRUCTOR_ARGUMENTS:
            yield f"__init__ of {count - 1} arguments"


@pytest.mark.parametrize("file", FILES)
def test_a_file_and_all_in_it_can_be_taken_in_at_once(file: str) -> None:
    assert list(too_large(FILES[file])) == []


def signature(count: int) -> str:
    return ", ".join(f"a{number}" for number in range(count))


@pytest.mark.parametrize(
    ("limit", "source", "said"),
    [
        (FILE_LINES, lambda n: "x = 1\n" * n, "file of 301 lines"),
        (FUNCTION_LINES, lambda n: "def f():\n" + "    x = 1\n" * (n - 1), "f of 61 lines"),
        (FUNCTION_LINES, lambda n: "async def f():\n" + "    x = 1\n" * (n - 1), "f of 61 lines"),
        (PARAMETERS, lambda n: f"def f({signature(n)}): ...", "f of 16 parameters"),
        (PARAMETERS, lambda n: f"def f(a, /, b, *, {signature(n - 2)}): ...", "f of 16 parameters"),
        (
            CONSTRUCTOR_ARGUMENTS,
            lambda n: f"class A:\n    def __init__(self, {signature(n)}): ...",
            "__init__ of 13 arguments",
        ),
        (
            CONSTRUCTOR_ARGUMENTS,
            lambda n: "@dataclass\nclass A:\n    c: ClassVar[int] = 1\n" + "    a: int\n" * n,
            "A of 13 fields",
        ),
    ],
)
def test_the_check_sees_what_is_one_too_large(limit, source, said) -> None:
    assert list(too_large(source(limit))) == []
    assert list(too_large(source(limit + 1))) == [said]
