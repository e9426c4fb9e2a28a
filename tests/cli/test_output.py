"""What is printed may be lost, but not the run: full disks, closed pipes and closed streams."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmlit.cli.output import LossyStream
from tests.helpers.tiny_cli import recipe

ROOT = Path(__file__).parents[2]
TRAIN = [sys.executable, str(ROOT / "scripts" / "train.py")]
needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def command(folder: Path) -> str:
    program = " ".join(TRAIN)
    return f"{program} --config {recipe(folder)} --runs {folder / 'runs'} --name a"


@pytest.mark.parametrize(
    "into",
    [
        "| head -1",
        "2>&1 | true",
        pytest.param("> /dev/full", marks=needs_dev_full),
        pytest.param("> /dev/full 2>&1", marks=needs_dev_full),
        ">&-",
    ],
)
def test_a_run_outlives_what_it_prints_to(tmp_path: Path, into: str) -> None:
    shell = ["bash", "-c", f"set -o pipefail; {command(tmp_path)} {into}"]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "a" / "checkpoints" / "000000320.ckpt").exists()
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stderr.count("warning: stdout: No space left") == (into == "> /dev/full")


class Pipe:
    def __init__(self, code: int) -> None:
        self.code = code

    def write(self, text: str) -> int:
        raise OSError(self.code, os.strerror(self.code))

    flush = fileno = lambda self: self.write("")


@pytest.mark.parametrize("code", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_nothing_that_is_printed_fails(capsys: pytest.CaptureFixture[str], code: int) -> None:
    stream = LossyStream(Pipe(code), "stdout")  # type: ignore[arg-type]
    for _ in range(3):
        print(json.dumps({"a": 1}), file=stream, flush=True)  # type: ignore[call-overload]
    stream.close_quietly()
    lost = f"warning: stdout: {os.strerror(code)}; what is printed there is lost\n"
    assert capsys.readouterr().err == ("" if code == errno.EPIPE else lost)
