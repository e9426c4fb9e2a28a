"""The loggers that a recipe names, and the folders that they write into."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from fmlit.core.errors import UserError
from tests.helpers.tiny_cli import runs_in, train


class ServerLogger(CSVLogger):
    """Has a folder of its own by default, as MLflow's has."""

    def __init__(self, save_dir: str = "./server", port: int = 80) -> None:
        super().__init__(save_dir, name="", version="")
        if port < 1:
            raise UserError(f"port must be positive, got {port}")


def test_loggers_write_into_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "elsewhere")}}
    loggers: list[Any] = [{"class_path": "CSVLogger"}, {"class_path": f"{__name__}.ServerLogger"}, named]
    recipe = tmp_path / "loggers.yaml"
    recipe.write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    assert train(tmp_path, f"--config={tmp_path / 'tiny.yaml'}", f"--config={recipe}", "--name=a").code == 0
    run = tmp_path / "runs" / "a"
    for folder in (run / "lightning_logs" / "version_0", run / "server"):
        assert (folder / "metrics.csv").is_file()
    assert (tmp_path / "elsewhere" / "lightning_logs" / "version_0" / "metrics.csv").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml", "loggers.yaml", "runs", "elsewhere"}


def test_the_config_of_a_run_puts_the_loggers_of_another_into_its_own_folder(tmp_path: Path) -> None:
    assert train(tmp_path, "--trainer.logger=CSVLogger").code == 0
    config = tmp_path / "runs" / "tiny" / "config.yaml"
    assert yaml.safe_load(config.read_text())["trainer"]["logger"]["init_args"]["save_dir"] is None
    assert train(tmp_path, f"--config={config}", "--name=again").code == 0
    assert (tmp_path / "runs" / "again" / "lightning_logs" / "version_0" / "metrics.csv").is_file()
    assert train(tmp_path, f"--config={config}", "--resume", "--images=640").summary["images_seen"] == 640
    assert (tmp_path / "runs" / "tiny" / "lightning_logs" / "version_1" / "metrics.csv").is_file()


def test_a_logger_that_cannot_be_built_is_named_and_leaves_no_run(tmp_path: Path) -> None:
    outcome = train(tmp_path, f"--trainer.logger={__name__}.ServerLogger", "--trainer.logger.port=0")
    assert outcome.error == "trainer.logger.port must be positive, got 0"
    assert not runs_in(tmp_path)


def test_the_help_says_where_a_logger_writes(tmp_path: Path) -> None:
    outcome = train(tmp_path, "--trainer.logger.help=CSVLogger")
    assert "Null means the run folder." in " ".join(outcome.out.split())
