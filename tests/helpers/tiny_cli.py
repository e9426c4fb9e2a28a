"""The training command, small enough for a test: an MLP on two points, run in this process."""

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from fmlit.cli import train as command

CONFIGS = Path(__file__).parents[2] / "configs"

RECIPE = """
images: 320
model:
  class_path: fmlit.FlowMatchingModule
  init_args:
    net:
      class_path: fmlit.MLP
      init_args: {width: 8, depth: 1}
data:
  class_path: fmlit.TwoPoints
  init_args: {samples: 64, batch_size: 16}
ema: {half_lives: [100]}
samples: {every: null}
checkpoint: {every: 80}
trainer: {log_every_n_steps: 5, accelerator: cpu}
"""


class Outcome(NamedTuple):
    """How a command ended, and what it wrote to the screen."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])

    @property
    def error(self) -> str:
        """The one line of a user's mistake."""
        lines = self.err.splitlines()
        assert self.code == 2, self
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")


def recipe(folder: Path, old: str = "", new: str = "", name: str = "tiny.yaml") -> Path:
    """The tiny recipe as a file, with one passage replaced."""
    assert old in RECIPE
    path = folder / name
    path.write_text(RECIPE.replace(old, new) if old else RECIPE)
    return path


def train(folder: Path, *args: str) -> Outcome:
    """``train.py --runs folder/runs ARGS``, with the tiny recipe where ``args`` name none."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command.train(["--runs", str(folder / "runs"), *args], default_config=recipe(folder))
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def runs_in(folder: Path) -> list[str]:
    """The names of all run folders."""
    return sorted(path.name for path in (folder / "runs").glob("*"))


def metrics_of(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))
