"""The floors of the package: an import points down or sideways, never up and never in a circle."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fmlit"

# By module, or by the package that it is in. What is not listed stands at the top, where everything may be imported.
FLOORS = {
    "fmlit": 0,
    "fmlit.tensors": 0,
    "fmlit.files": 0,
    "fmlit.randomness": 0,
    "fmlit.paths": 1,
    "fmlit.mixtures": 1,
    "fmlit.predictions": 1,
    "fmlit.times": 1,
    "fmlit.couplings": 1,
    "fmlit.objectives": 1,
    "fmlit.dynamics": 1,
    "fmlit.guidance": 1,
    "fmlit.solvers": 1,
    "fmlit.likelihood": 1,
    "fmlit.networks": 2,
    "fmlit.compilation": 2,
    "fmlit.generative": 2,
    "fmlit.uncertainty": 2,
    "fmlit.fields": 3,
    "fmlit.samplers": 3,
    "fmlit.generation": 3,
    "fmlit.metrics": 3,
    "fmlit.pictures": 3,
    "fmlit.data": 4,
    "fmlit.descriptions": 4,
    "fmlit.checkpoints": 4,
    "fmlit.export": 4,
    "fmlit.gradients": 4,
    "fmlit.optimizers": 4,
    "fmlit.schedules": 4,
    "fmlit.modules": 4,
    "fmlit.callbacks": 4,
}
TOP = 5

# The mathematics is usable without a training framework: torch, and one library each where stated.
ALLOWED_BELOW_FLOOR_2 = {
    "fmlit.randomness": {"torch", "numpy"},
    "fmlit.solvers": {"torch", "torchdiffeq"},
    "fmlit.couplings": {"torch", "scipy"},
}


def modules() -> dict[str, Path]:
    """The path of every module of the package, by its name."""
    named = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def floor(module: str) -> int:
    return FLOORS.get(module, FLOORS.get(".".join(module.split(".")[:2]), TOP))


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


def climbing(sources: dict[str, str]) -> list[str]:
    """The imports that point up."""
    return [
        f"{module} (floor {floor(module)}) imports {imported} (floor {floor(imported)})"
        for module, source in sources.items()
        for imported in imports(source, module, set(sources))
        if imported.startswith("fmlit") and floor(imported) > floor(module)
    ]


SOURCES = {name: path.read_text() for name, path in modules().items()}


def test_imports_point_down_or_sideways() -> None:
    assert not climbing(SOURCES)


@pytest.mark.parametrize(
    "fault",
    [
        "from fmlit.cli import train",
        "from fmlit import modules",
        "import fmlit.metrics.quality",
        "def f():\n    from fmlit.networks import UNet",
    ],
)
def test_the_check_sees_an_import_that_points_up(fault: str) -> None:
    assert len(climbing(SOURCES | {"fmlit.paths": fault})) == 1
    assert not climbing(SOURCES | {"fmlit.newer_than_this_test": fault})


def test_every_floor_is_of_a_module_that_exists() -> None:
    assert not [name for name in FLOORS if name not in SOURCES]


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
        TopologicalSorter(graph | {"fmlit.tensors": {"fmlit.paths"}}).prepare()


@pytest.mark.parametrize("module", [name for name in SOURCES if floor(name) < 2])
def test_the_mathematics_needs_torch_and_little_else(module: str) -> None:
    allowed = ALLOWED_BELOW_FLOOR_2.get(".".join(module.split(".")[:2]), {"torch"})
    foreign = {name for name in imports(SOURCES[module], module, set(SOURCES)) if not name.startswith("fmlit")}
    assert foreign - set(sys.stdlib_module_names) <= allowed


def test_scripts_are_thin() -> None:
    for path in (PACKAGE.parent / "scripts").glob("*.py"):
        tree = ast.parse(path.read_text())
        assert not [node.name for node in tree.body if isinstance(node, ast.ClassDef)], path
        assert len(path.read_text().splitlines()) <= 60, path


def test_the_package_itself_imports_nothing() -> None:
    assert not list(imports(SOURCES["fmlit"], "fmlit", set(SOURCES)))
