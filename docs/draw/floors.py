"""The folders of the package and what they import, read off the source code. Shown in docs/architecture.md."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import fmlit
from docs.draw.style import DATA, MUTED, styled

PACKAGE = Path(fmlit.__file__).parent
COLUMNS = {"flows": 1, "models": 1, "data": 2, "storage": 2, "training": 2, "evaluation": 2, "cli": 2, "metrics": 3}
WIDTH, HEIGHT = 0.86, 0.62  # of a box, where columns and floors are 1 apart


def folder_imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """For each folder of the package, the other folders that it imports at run time."""
    folders = sorted(path.parent.name for path in package.glob("*/__init__.py"))
    imported: dict[str, set[str]] = {folder: set() for folder in folders}
    for folder in folders:
        for file in (package / folder).rglob("*.py"):
            for name in _imports(ast.parse(file.read_text(encoding="utf-8"))):
                parts = name.split(".")
                if parts[0] == package.name and len(parts) > 1 and parts[1] in imported:
                    imported[folder].add(parts[1])
    return {folder: names - {folder} for folder, names in imported.items()}


def _imports(tree: ast.AST) -> list[str]:
    """The dotted names that a module imports anywhere, but not those for type checkers only."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.dump(tree.test):
        return []
    if isinstance(tree, ast.Import):
        return [alias.name for alias in tree.names]
    if isinstance(tree, ast.ImportFrom):
        return [f"{tree.module}.{alias.name}" for alias in tree.names]
    return [name for child in ast.iter_child_nodes(tree) for name in _imports(child)]


def floor_of(folder: str, imports: Mapping[str, set[str]]) -> int:
    """One more than the highest floor that the folder imports from; 0 if it imports no other folder."""
    return max((1 + floor_of(below, imports) for below in imports[folder]), default=0)


def direct_imports(folder: str, imports: Mapping[str, set[str]]) -> set[str]:
    """The imported folders without those that another imported folder leads to."""
    return imports[folder] - {far for near in imports[folder] for far in reachable(near, imports)}


def reachable(folder: str, imports: Mapping[str, set[str]]) -> set[str]:
    """All folders below this one that its imports lead to."""
    return imports[folder].union(*(reachable(below, imports) for below in imports[folder]))


@styled
def floors() -> Figure:
    """A box for each folder, and an arrow to each folder that it imports directly."""
    imports = folder_imports()
    height = {folder: floor_of(folder, imports) for folder in imports}
    figure = Figure(figsize=(7.6, 5.4))
    axes = figure.subplots()
    for folder in imports:
        x, y = COLUMNS.get(folder, 0), height[folder]
        wide = not imports[folder]  # everything rests on it
        left, width = (0, 3 + WIDTH) if wide else (x, WIDTH)
        box = FancyBboxPatch((left, y), width, HEIGHT, "round,pad=0,rounding_size=0.06", ec=DATA, fc="#E5F1F8")
        axes.add_patch(box)
        axes.text(left + width / 2, y + HEIGHT / 2, folder, ha="center", va="center", fontsize=12, weight="bold")
        for below in direct_imports(folder, imports):
            aim = COLUMNS.get(below, 0)
            end = x if not imports[below] else aim
            side = (end > x) - (end < x)  # arrows to a side start and end near it, clear of the boxes between
            points = (x + WIDTH / 2 + 0.4 * side, y), (end + WIDTH / 2 - 0.25 * side, height[below] + HEIGHT)
            look: Any = {"arrowstyle": "-|>", "mutation_scale": 11, "color": MUTED, "shrinkA": 0, "shrinkB": 1}
            axes.add_patch(FancyArrowPatch(*points, **look))
    axes.set(xlim=(-0.1, 3 + WIDTH + 0.1), ylim=(-0.1, max(height.values()) + HEIGHT + 0.1))
    axes.set_axis_off()
    return figure
