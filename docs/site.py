"""Hooks of ``mkdocs build``: the home page, the reference, and links to files of the repository.

The guides link to files as a code host shows them. On the site, a link to a module leads to its page of the reference,
and a link to any other file leads to a copy of it. The reference has one page for each module of the package. Its first
page lists the public names from the table in ``fmlit/__init__.py``.
"""

import ast
import os
import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fmlit

ROOT = Path(__file__).parents[1]
OUTSIDE = {  # pages whose text lies outside of docs/
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docker/README.md": "docker.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def modules() -> dict[str, Path]:
    """The modules of the reference by their dotted name, folder by folder, a package before what it holds."""
    paths = sorted((ROOT / "fmlit").rglob("*.py"), key=lambda path: (path.parent, path.name != "__init__.py", path))
    dotted = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths)
    return {name: path for name, path in zip(dotted, paths, strict=True) if name not in ("fmlit", "fmlit.__main__")}


def page_of(module: str, path: Path) -> str:
    """The page of a module: reference/flows/paths.md, and reference/flows/index.md for a package."""
    parts = module.split(".")[1:] + (["index"] if path.name == "__init__.py" else [])
    return f"reference/{'/'.join(parts)}.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "reference/index.md", content=public_names()))
    for module, path in modules().items():
        files.append(File.generated(config, page_of(module, path), content=f"# {module}\n\n::: {module}\n"))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    for entry in config.nav or []:
        if "Reference" in entry:
            entry["Reference"] = ["reference/index.md", *_reference_nav()]
    return config


def _reference_nav() -> list[dict[str, list]]:
    folders: dict[str, list] = {}
    for module, path in modules().items():
        inside = module.split(".")[1:]
        folder = folders.setdefault(inside[0], [])
        folder.append(page_of(module, path) if len(inside) == 1 else {".".join(inside[1:]): page_of(module, path)})
    return [{name: pages} for name, pages in folders.items()]


def public_names() -> str:
    """The first page of the reference: each public name, what it is, and its place in the package."""
    lines = [
        "# Reference",
        "",
        "`import fmlit` offers these names. Recipes, checkpoints and exports use them too.",
        "The solvers are functions in [`fmlit.solvers`](solvers/index.md).",
    ]
    for folder in fmlit.FOLDERS:
        names = {name: module for name, module in fmlit.PUBLIC.items() if module.split(".")[1] == folder}
        if names:
            lines += ["", f"## {folder}", "", "| name | what it is |", "|---|---|"]
        for name, module in names.items():
            lines.append(f"| [`fmlit.{name}`][{module}.{name}] | {_summary(module, name)} |")
    return "\n".join([*lines, ""])


def _summary(module: str, name: str) -> str:
    """The first line of an object's docstring, read from the source."""
    tree = ast.parse(modules()[module].read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
            return paragraph.replace("\n", " ").replace("``", "`").replace("|", "\\|")
    raise LookupError(f"{module} does not define {name}")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links of the site."""
    uri = page.file.src_uri
    if uri.startswith("reference/"):
        return markdown
    source = next((outside for outside, inside in OUTSIDE.items() if inside == uri), f"docs/{uri}")

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        found = _site_uri(path, config, files)
        if found is None:
            return text
        inside = LINK.sub(link, text)  # an image that is a link
        return f"{image}[{inside}]({posixpath.relpath(found, posixpath.dirname(uri) or '.')}{anchor})"

    return LINK.sub(link, markdown)


def _site_uri(path: str, config: MkDocsConfig, files: Files) -> str | None:
    """Where the site holds a file of the repository; None for a folder that has no page."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path.startswith("docs/") and path.endswith((".md", ".png", ".gif")):
        return path.removeprefix("docs/")
    if path == "fmlit/__init__.py":
        return "reference/index.md"
    module = ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")
    if module in modules():
        return page_of(module, modules()[module])
    if (ROOT / path).is_file():
        copy = f"files/{path}"
        if copy not in files.src_uris:
            files.append(File.generated(config, copy, content=(ROOT / path).read_bytes()))
        return copy
    if os.path.isdir(ROOT / path):
        return None
    raise FileNotFoundError(f"a page links to {path}, which does not exist")
