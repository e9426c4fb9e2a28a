"""A user whom the machine does not know, as in containers: without a name, and perhaps without a home."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny_cli import CONFIGS, metrics_of, recipe, runs_in

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        os.name != "posix" or os.geteuid() != 0 or shutil.which("setpriv") is None,
        reason="another user needs root and setpriv",
    ),
]
# May read everything, as the interpreter of this test may lie in root's home, and write nothing of anybody's.
USER = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", "--inh-caps=-all,+dac_read_search"]
USER += ["--ambient-caps=-all,+dac_read_search"]


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A folder that everybody may write; pytest's own ones are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.mark.parametrize("home", [None, "/"], ids=["no home", "a home of others"])
def test_a_user_without_a_name_and_a_home_trains_with_wandb(home: str | None, everybodys: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "LANG")}
    environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(everybodys)} | ({"HOME": home} if home else {})
    script = [sys.executable, str(CONFIGS.parent / "scripts" / "train.py"), "--config", str(recipe(everybodys))]
    command = [*USER, *script, "--runs", str(everybodys / "runs"), "--trainer.logger=fmlit.WandbLogger"]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=600, check=False)
    run = everybodys / "runs" / "tiny"
    assert done.returncode == 0, done.stderr
    (notice,) = [line for line in done.stderr.splitlines() if line.startswith("W&B")]
    assert notice.startswith("W&B: recording offline (no API key")
    assert runs_in(everybodys) == ["tiny"]
    assert metrics_of(run)[-1]["images_seen"] == "320"
    assert len(list(run.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert run.stat().st_uid == 12345
