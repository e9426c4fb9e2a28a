"""The floors of the package: an import points down, never up, never sideways, and never in a circle."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fmlit"

# The folders of the package, from the ground up. Folders on one floor do not import each other.
ORDER = "core < flows, data, metrics < solvers < models < sampling, storage < training < evaluation < cli < __main__"
FLOORS = {folder: floor for floor, folders in enumerate(ORDER.split(" < ")) for folder in folders.split(", ")}

# The mathematics is usable without a training framework: torch, and one library each where stated.
ALLOWED = {"core": {"torch", "numpy", "rich"}, "flows": {"torch", "scipy"}, "solvers": {"torch", "torchdiffeq"}}


def modules() -> dict[str, Path]:
    """The path of every module of the package, by its name."""
    named = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def folder(module: str) -> str:
    """``flows`` of ``fmlit.flows.paths``; empty for the package itself."""
    return ".".join(module.split(".")[1:2])


def imports(source: str, module: str, known: set[str], everywhere: bool = True) -> Iterator[str]:
    """What a module imports: modules of the package by their full name, others by that of their package.

    ``everywhere`` counts imports inside functions too, but those for type checkers never.
    """
    tree = ast.parse(source)
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    skipped = {id(inner) for node in typing_only for inner in ast.walk(node)}
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    if not everywhere:
        skipped |= {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "fmlit":
                yield name.split(".")[0]
            else:
                yield name if name in known else name.rpartition(".")[0]


def misplaced(sources: dict[str, str]) -> list[str]:
    """The imports that point up, or from one folder to another on the same floor."""
    return [
        f"{module} imports {imported}"
        for module, source in sources.items()
        for imported in imports(source, module, set(sources))
        if folder(imported) in FLOORS
        and folder(imported) != folder(module)
        and FLOORS[folder(imported)] >= FLOORS[folder(module)]
    ]


SOURCES = {name: path.read_text() for name, path in modules().items()}


def test_imports_point_down() -> None:
    assert not misplaced(SOURCES)


@pytest.mark.parametrize(
    "fault",
    [
        "from fmlit.cli import train",
        "from fmlit.training import modules",
        "import fmlit.metrics.image_quality",
        "def f():\n    from fmlit.models.unet import UNet",
        "from fmlit.data.digits import Digits",
    ],
)
def test_the_check_sees_an_import_that_points_up_or_sideways(fault: str) -> None:
    assert len(misplaced(SOURCES | {"fmlit.flows.paths": fault})) == 1
    assert not misplaced(SOURCES | {"fmlit.flows.paths": "from fmlit.core import tensors"})


def test_every_module_is_in_a_folder_of_the_order() -> None:
    assert {folder(name) for name in SOURCES if name != "fmlit"} == set(FLOORS)
    assert [path.name for path in PACKAGE.glob("*.py") if path.name != "__main__.py"] == ["__init__.py"]


def test_no_circles() -> None:
    graph = {
        module: {name for name in imports(source, module, set(SOURCES), everywhere=False) if name in SOURCES} - {module}
        for module, source in SOURCES.items()
    }
    for module in graph:
        # A package that gathers names from its modules is no circle with them.
        graph[module] = {name for name in graph[module] if not module.startswith(f"{name}.")}
    TopologicalSorter(graph).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter(graph | {"fmlit.core.tensors": {"fmlit.flows.paths"}}).prepare()


@pytest.mark.parametrize("module", [name for name in SOURCES if folder(name) in ALLOWED])
def test_the_mathematics_needs_torch_and_little_else(module: str) -> None:
    foreign = {name for name in imports(SOURCES[module], module, set(SOURCES)) if not name.startswith("fmlit")}
    assert foreign - set(sys.stdlib_module_names) <= ALLOWED[folder(module)]


def test_scripts_are_thin() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        tree = ast.parse(path.read_text())
        assert not [node.name for node in tree.body if isinstance(node, ast.ClassDef)], path
        assert len(path.read_text().splitlines()) <= 60, path


def test_the_package_itself_imports_nothing_of_its_own() -> None:
    assert set(imports(SOURCES["fmlit"], "fmlit", set(SOURCES))) == {"importlib", "typing"}
