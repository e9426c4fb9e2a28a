"""Private names of Lightning, torch and jsonargparse are touched in two rooms only, where each has its reason."""

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fmlit"
ROOMS = {"fmlit.core.internals", "fmlit.training.lightning_internals"}
LIBRARIES = {"lightning", "torch", "jsonargparse"}
OTHERS = {"_asdict", "_actions", "_action_groups"}  # of the standard library: of a named tuple, and of argparse


def sources() -> dict[str, str]:
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path.read_text() for path in paths}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.AST) -> Iterator[str]:
    """The names that a module itself defines, as functions, classes, variables, attributes or arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def touched(tree: ast.AST) -> Iterator[str]:
    """The private names that a module imports from elsewhere or reads off an object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if any(map(private, alias.name.split("."))))
        elif isinstance(node, ast.ImportFrom):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in names if any(map(private, name.split("."))))
        elif isinstance(node, ast.Attribute) and private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield from [node.value] * private(node.value)  # as in getattr(trainer, "_connector")


def foreign(modules: dict[str, str]) -> dict[str, list[str]]:
    """For each module outside of the two rooms, the private names that nothing in the package defines."""
    trees = {name: ast.parse(source) for name, source in modules.items()}
    known = OTHERS.union(*(defined(tree) for name, tree in trees.items() if name not in ROOMS))
    faults = {name: [use for use in touched(tree) if use not in known] for name, tree in trees.items()}
    return {name: uses for name, uses in faults.items() if uses and name not in ROOMS}


def test_private_names_are_touched_in_the_two_rooms_only() -> None:
    assert foreign(sources()) == {}


@pytest.mark.parametrize(
    "fault",
    [
        "import torch._dynamo",
        "from jsonargparse import _typehints",
        "from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher",
        "def f(trainer):\n    return trainer.fit_loop._should_accumulate()",
        "def f(trainer):\n    return getattr(trainer, '_accelerator_connector')",
        "def f(trainer):\n    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = None",
        "class A:\n    def f(self):\n        return self._trainer",
    ],
)
def test_the_check_sees_a_private_name(fault: str) -> None:
    assert foreign(sources() | {"fmlit.training.fault": fault}).keys() == {"fmlit.training.fault"}


def test_no_class_overrides_a_private_method_of_a_library_elsewhere() -> None:
    found = []
    for name in sources():
        module = import_module(name)
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != name or name in ROOMS:
                continue
            bases = [base for base in cls.__mro__[1:] if base.__module__.split(".")[0] in LIBRARIES]
            methods = [method for method, value in vars(cls).items() if private(method) and callable(value)]
            found += [f"{name}.{cls.__name__}.{m}" for m in methods if any(m in vars(base) for base in bases)]
    # A help formatter has no other way; argparse, whose method it is, tells subclasses to override it.
    assert found == ["fmlit.cli.parsing.HelpFormatter._get_help_string"]
