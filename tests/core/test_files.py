"""Paths as a shell means them."""

from pathlib import Path

import pytest

from fmlit.core.errors import UserError
from fmlit.core.files import expand


def test_a_path_means_what_a_shell_means_by_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert expand("runs") == Path("runs")
    assert expand("~/runs") == expand("$HOME/runs") == expand(Path("~/runs")) == tmp_path / "runs"
    assert expand("${SCRATCH}/runs") == Path("/scratch/me/runs")
    for path, message in {
        "$NOWHERE/runs": r"^data.root: \$NOWHERE in \$NOWHERE/runs is unknown",
        "~nobody-of-that-name/runs": "~nobody-of-that-name in ~nobody-of-that-name/runs is unknown",
        "s3://bucket/runs": "s3://bucket/runs is a URL: give a local path",
    }.items():
        with pytest.raises(UserError, match=message):
            expand(path, "data.root")


def test_a_file_may_have_a_dollar_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a$b.png").touch()
    assert expand("a$b.png") == Path("a$b.png")
