"""The documentation site: it builds without a warning, holds every public name, and needs no other server."""

import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

import fmlit

pytest.importorskip("mkdocstrings", reason="the site needs pip install -e '.[docs]'")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder


def ids(page: Path) -> set[str]:
    return set(re.findall(r'\bid="?([^"\s>]+)', page.read_text()))


def test_every_public_name_has_its_entry(site: Path) -> None:
    for name, module in fmlit.PUBLIC.items():
        folder = site / "reference" / "/".join(module.split(".")[1:])
        assert f"{module}.{name}" in ids(folder.with_suffix(".html")), name


def test_every_link_inside_the_site_leads_somewhere(site: Path) -> None:
    anchors = {page: ids(page) for page in site.rglob("*.html")}
    broken, checked = [], 0
    for page in anchors:
        if page.name == "404.html":  # its links start at the root of a server
            continue
        for target in re.findall(r'<(?:a|img|link|script)\b[^>]*?\b(?:href|src)="([^"]+)"', page.read_text()):
            path, _, anchor = unescape(target).partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            checked += 1
            file = (page.parent / unquote(path)).resolve() if path else page
            if not file.is_file() or (anchor and file in anchors and unquote(anchor) not in anchors[file]):
                broken.append(f"{page.relative_to(site)} -> {target}")
    assert broken == []
    assert checked > 1000


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    loads = r'<(?:img|link|script)\b[^>]*?\b(?:href|src)="(https?://[^"]+)"'
    assert {url for page in site.rglob("*.html") for url in re.findall(loads, page.read_text())} == set()
