"""What an import pulls in: seconds of start-up that nobody asked for, and libraries that may be missing."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("lightning", "pytorch_lightning", "torchmetrics", "diffusers", "torchvision", "transformers", "wandb")
LATE = (
    "diffusers",
    "torchvision",
    "transformers",
    "wandb",
    "sklearn",
    "matplotlib",
    "scipy",
    "torchdiffeq",
    "requests",
)


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh interpreter."""
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def pulled_in(code: str, names: tuple[str, ...], *args: str) -> list[str]:
    """Which of these libraries are loaded after the code has run."""
    ended = run(f"import sys, json\n{textwrap.dedent(code)}\nprint(json.dumps(sorted(sys.modules)))", *args)
    assert ended.returncode == 0, ended.stderr
    loaded = {name.split(".")[0] for name in json.loads(ended.stdout.splitlines()[-1])}
    return [name for name in names if name in loaded]


def test_the_mathematics_comes_without_a_training_framework() -> None:
    code = """
    import pkgutil
    import fmlit.core, fmlit.flows, fmlit.solvers
    for room in (fmlit.core, fmlit.flows, fmlit.solvers):
        for module in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
            __import__(module.name)
    """
    assert not pulled_in(code, HEAVY)


def test_help_loads_nothing_that_only_training_needs() -> None:
    """Beyond what Lightning loads by itself."""
    code = """
    import contextlib, io
    from pathlib import Path
    import lightning.pytorch.cli
    before = set(sys.modules)
    from fmlit.cli.train import train
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        train(["--help"], Path("configs/quickstart.yaml"))
    for name in before:
        sys.modules.pop(name)
    """
    assert not pulled_in(code, LATE)


NO_WANDB = """
import json, sys
from pathlib import Path

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "wandb":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from fmlit.cli.train import train
folder = Path(sys.argv[1])
train(["--runs", str(folder)], folder / "tiny.yaml")
try:
    train(["--runs", str(folder), "--trainer.logger=fmlit.WandbLogger"], folder / "tiny.yaml")
except SystemExit as end:
    sys.exit(end.code)
"""


def test_training_works_where_wandb_is_not_installed_as_long_as_nobody_names_it(tmp_path: Path) -> None:
    from tests.helpers.tiny_cli import recipe

    recipe(tmp_path)
    ended = run(NO_WANDB, str(tmp_path))
    assert json.loads(ended.stdout.splitlines()[-1])["images_seen"] == 320
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: trainer.logger: wandb cannot be imported (No module named 'wandb')")
    assert len(ended.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.glob("tiny*") if path.is_dir()] == ["tiny"]


@pytest.mark.slow
def test_help_costs_little_more_than_lightning_itself() -> None:
    """In processor seconds, which a loaded machine changes less than the time on the wall; the best of three each."""

    def seconds(command: list[str]) -> float:
        code = """
        import resource, subprocess, sys
        subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)
        """
        return min(float(run(code, *command).stdout) for _ in range(3))

    bare = seconds([sys.executable, "-c", "import lightning.pytorch.cli"])
    assert seconds([sys.executable, "scripts/train.py", "--help"]) < bare + 2


@pytest.mark.parametrize("script", ["benchmark", "figures"])
def test_scripts_of_a_clone_find_what_lies_outside_the_package(script: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert ended.stdout.startswith(f"usage: {script}.py [--KEY VALUE ...]"), ended.stderr
