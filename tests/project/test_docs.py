"""The documentation is true: its code runs, its links lead somewhere, the names in it are those of the code."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.draw.command import PICTURES

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COURSE = {name: (ROOT / "docs" / name).read_text() for name in ("course.md", "course_training.md")}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
NAMES = [(text.strip("`"), target) for text, target in LINK.findall("".join(COURSE.values())) if target.endswith(".py")]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(blocks: list[str]) -> dict[str, Any]:
    """All blocks in one namespace, as a reader types them in one after the other."""
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "documentation", "exec"), names)
    return names


def found_in(name: str, file: Path) -> Any:
    """The object that ``paths.GaussianPath.sample`` names in a module of the package."""
    module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    found: Any = module
    parts = name.split(".")
    for part in parts if hasattr(module, parts[0]) else parts[1:]:
        found = getattr(found, part)
    return found


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", COURSE)
def test_the_code_of_the_course_pages_runs(page: str) -> None:
    blocks = python_blocks(COURSE[page])
    assert len(blocks) >= 8
    assert sum("assert " in block for block in blocks) >= len(blocks) - 2  # they check what they claim
    torch.manual_seed(0)
    run(blocks)


def test_the_code_of_the_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(python_blocks((ROOT / "docs" / "python.md").read_text()))
    assert names["module"].images_seen == 20 * 64
    assert names["pictures"].newest == Path("runs/notebook/samples/000001280.png")
    assert (tmp_path / "runs/notebook/samples/000000640.png").exists()
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_code_of_the_readme_does_what_it_says() -> None:
    (block,) = python_blocks((ROOT / "README.md").read_text())
    torch.manual_seed(0)
    samples = run([block])["samples"]
    assert samples.shape == (1000, 1)
    assert (samples.abs() - 2).abs().max() < 0.1
    assert 400 < (samples > 0).sum() < 600


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = [target.partition("#")[0] for _, target in LINK.findall(page.read_text())]
    local = [target for target in targets if target and "://" not in target]
    assert not [target for target in local if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", COURSE)
def test_a_course_page_is_short_enough_to_read(page: str) -> None:
    assert len(COURSE[page].splitlines()) < 300


@pytest.mark.parametrize(("name", "target"), sorted(set(NAMES)), ids=lambda value: value)
def test_names_of_the_course_pages_are_those_of_the_code(name: str, target: str) -> None:
    """A link to a module names something that is defined there; one to a test file names a test."""
    file = (ROOT / "docs" / target).resolve()
    if name.startswith("test_"):
        assert name in functions(file)
        return
    found = found_in(name, file)
    if isinstance(found, property):
        found = found.fget
    if inspect.isclass(found) or inspect.isfunction(found):
        assert Path(inspect.getsourcefile(found) or "").resolve() == file
    else:  # a type alias does not know where it was made
        assert re.search(rf"^{name.rpartition('.')[2]} = ", file.read_text(), re.MULTILINE)


def test_every_picture_that_is_drawn_is_shown() -> None:
    links = LINK.findall("".join(page.read_text() for page in PAGES))
    shown = {Path(target).name for _, target in links if "figures/" in target and "fmlit" not in target}
    assert shown >= set(PICTURES)
    drawn = {path.name: path.stat().st_size for path in (ROOT / "docs" / "figures").iterdir()}
    assert set(drawn) >= shown
    assert max(size for name, size in drawn.items() if name.endswith(".png")) < 150_000
    assert max(drawn.values()) < 1_500_000


FAULTS = [
    line.split(" | ", maxsplit=3)
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines()
    if re.match(r"\| [ABC]\d+ \|", line)
]


def test_faults_are_numbered_within_each_table() -> None:
    ids = [row[0].removeprefix("| ") for row in FAULTS]
    assert ids == [f"{group}{number}" for group in "ABC" for number in range(1, 1 + "".join(ids).count(group))]


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row[0].removeprefix("| "))
def test_every_fault_has_a_test_or_is_said_to_be_open(row: list[str]) -> None:
    evidence = row[3]
    tests = re.findall(r"`([\w/]+\.py)::(test_\w+)`", evidence)
    assert tests or "**open:**" in evidence
    assert len(tests) == evidence.count("::")  # none is misspelled
    for file, name in tests:
        assert name in functions(ROOT / "tests" / file), f"{file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_tests_that_exist(page: Path) -> None:
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", page.read_text()):
        assert name in functions(ROOT / "tests" / file), f"{file} has no {name}"
