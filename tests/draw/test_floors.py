"""The picture of the floors shows what the code imports."""

import pytest

from docs.draw.floors import COLUMNS, direct_imports, floor_of, folder_imports, reachable
from tests.project.test_floors import FLOORS


def test_the_picture_agrees_with_the_order_of_the_folders():
    imports = folder_imports()
    assert set(imports) == set(FLOORS) - {"__main__"}
    assert all(FLOORS[below] < FLOORS[folder] for folder in imports for below in imports[folder])
    assert imports["core"] == set()
    assert "flows" in imports["solvers"]


def test_no_two_boxes_share_a_place():
    imports = folder_imports()
    places = [(COLUMNS.get(folder, 0), floor_of(folder, imports)) for folder in imports]
    assert len(set(places)) == len(places) == 11


@pytest.fixture
def package(tmp_path):
    sources = {
        "ground": "import os",
        "middle": "def f():\n    from pack.ground import x",
        "top": "from pack.middle import y\nimport pack.ground.z\nfrom pack import other",
        "other": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pack.top import w",
    }
    for folder, source in sources.items():
        (tmp_path / "pack" / folder / "deep").mkdir(parents=True)
        (tmp_path / "pack" / folder / "__init__.py").touch()
        (tmp_path / "pack" / folder / "deep" / "module.py").write_text(source)
    return tmp_path / "pack"


def test_imports_are_read_off_the_source(package):
    imports = folder_imports(package)
    assert imports == {"ground": set(), "middle": {"ground"}, "other": set(), "top": {"ground", "middle", "other"}}
    assert {folder: floor_of(folder, imports) for folder in imports} == {"ground": 0, "middle": 1, "other": 0, "top": 2}
    assert direct_imports("top", imports) == {"middle", "other"}  # ground follows from middle
    assert reachable("top", imports) == {"ground", "middle", "other"}
