"""``fmlit COMMAND``: the table of commands, how each is started, and recipes that are found by name."""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import fmlit
from fmlit.cli import recipes
from fmlit.cli.main import COMMANDS, main
from fmlit.core.errors import UserError
from tests.helpers.tiny_cli import CONFIGS, train

ROOT = CONFIGS.parent


def usage(*args: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The first line of a command's help."""
    with pytest.raises(SystemExit) as end:
        main([*args, "--help"])
    assert not end.value.code
    return capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_and_has_a_script_of_its_name(command: str) -> None:
    assert callable(getattr(import_module(f"fmlit.cli.{command}"), command))
    script = (ROOT / "scripts" / f"{command}.py").read_text()
    assert f'main(["{command}", *sys.argv[1:]])' in script


@pytest.mark.parametrize("command", COMMANDS)
def test_usage_names_the_program_as_it_was_started(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/fmlit", command])
    assert usage(command, capsys=capsys).startswith(f"usage: fmlit {command} [")
    monkeypatch.setattr(sys, "argv", [f"scripts/{command}.py"])
    assert usage(command, capsys=capsys).startswith(f"usage: {command}.py [")


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_commands_and_recipes(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(args)
    shown = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert f"  {name:11}{summary}\n" in shown
    assert "cifar10_flow, cifar10_score" in shown


def test_help_and_version_load_no_library() -> None:
    code = "import sys; from fmlit.cli.main import main; main(['--help']); main(['--version']); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    *_, version, modules = ended.stdout.splitlines()
    assert version == f"fmlit {fmlit.__version__}"
    assert not {"torch", "lightning", "jsonargparse", "yaml"} & set(modules.split())


@pytest.mark.parametrize(
    ("command", "hint"),
    [("trian", "did you mean train?"), ("--config", "fmlit --help lists them"), ("x", "fmlit --help lists them")],
)
def test_an_unknown_command_is_one_line(command: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: there is no command {command}; {hint}\n"


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fmlit.cli.train.train", interrupt)
    with pytest.raises(SystemExit) as end:
        main(["train"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.slow
def test_processes_are_started_again_by_the_same_command_in_any_folder(tmp_path: Path) -> None:
    options = ["--trainer.max_steps=2", "--samples.every=null", "--quality.every=null", "--trainer.accelerator=cpu"]
    command = [sys.executable, "-m", "fmlit", "train", *options, "--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs" / "quickstart" / "checkpoints" / "last.ckpt").exists()


# Recipes


def test_recipes_that_ship_are_those_of_the_repository() -> None:
    assert recipes.names() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert recipes.FOLDER.is_symlink()
    assert recipes.FOLDER.resolve() == CONFIGS


@pytest.mark.parametrize("name", ["cifar10_flow", "cifar10_flow.yaml"])
def test_a_recipe_is_found_by_name_unless_a_file_of_that_name_is_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10_flow").mkdir()  # a folder is no recipe
    assert recipes.find_recipe(name) == recipes.FOLDER / "cifar10_flow.yaml"
    shutil.copy(CONFIGS / "quickstart.yaml", "cifar10_flow.yaml")
    assert recipes.find_recipe(name) == Path("cifar10_flow.yaml")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar_flow", "did you mean cifar10_flow?"),
        ("configs/cifar10_flow.yaml", "did you mean cifar10_flow?"),
        ("mine/first.yaml", "did you mean mine/fist.yaml?"),
        ("unknown", "the recipes of fmlit are cifar10_cpu, cifar10_flow, "),
    ],
)
def test_a_mistyped_name_suggests_a_near_one(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "fist.yaml").touch()
    with pytest.raises(UserError) as error:
        recipes.find_recipe(name)
    assert str(error.value).startswith(f"config: cannot read {name} (No such file or directory); {hint}")


@pytest.mark.parametrize("given", ["--config toy_two_points", "--config=toy_two_points", "-c toy_two_points"])
def test_the_run_of_a_named_recipe_has_its_name_and_values(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = train(tmp_path, *given.split(), "--print_config")
    assert yaml.safe_load(shown.out)["data"]["class_path"] == "fmlit.TwoPoints"
    outcome = train(tmp_path, *given.split(), "--images=1024", "--samples.every=null")
    assert outcome.summary["run"] == str(tmp_path / "runs" / "toy_two_points")
