"""metrics.csv and W&B: recorded for real, offline, and read back."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import wandb
from PIL import Image

from fmlit.training.callbacks import TrainingLog
from fmlit.training.loggers import MetricsFile, WandbLogger
from fmlit.training.wandb_environment import give_home
from tests.helpers.tiny_cli import Outcome, metrics_of, runs_in, train
from tests.helpers.wandb_files import history, no_account, recorded  # noqa: F401  # a fixture among them

pytestmark = pytest.mark.usefixtures("no_account")
KEY = "0123456789abcdef" * 5


def test_every_row_is_on_the_disk_at_once(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.log_metrics({"images_seen": 10, "loss": 0.1 + 0.2}, step=1)
    assert metrics_of(tmp_path) == [{"step": "1", "images_seen": "10", "loss": "0.30000000000000004"}]
    metrics.log_metrics({"images_seen": 20, "loss": 0.25}, step=2)
    assert [row["loss"] for row in metrics_of(tmp_path)] == ["0.30000000000000004", "0.25"]


def test_what_is_logged_at_one_step_is_one_row_whatever_the_order_of_columns(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.log_metrics({"loss": 1.0, "images_seen": 10}, step=1)
    metrics.log_metrics({"loss": 2.0, "images_seen": 20}, step=2)
    metrics.log_metrics({"fid_5k": 9.5, "images_seen": 20}, step=2)  # a new column
    metrics.log_metrics({"images_seen": 30, "fid_5k": 8.5}, step=3)
    metrics.log_metrics({"loss": 3.0, "images_seen": 30}, step=3)  # a column of old
    metrics.log_metrics({"a, b": 4.0}, step=4)
    assert [[row[c] for c in ("step", "images_seen", "loss", "fid_5k", "a, b")] for row in metrics_of(tmp_path)] == [
        ["1", "10", "1.0", "", ""],
        ["2", "20", "2.0", "9.5", ""],
        ["3", "30", "3.0", "8.5", ""],
        ["4", "", "", "", "4.0"],
    ]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from fmlit.training.loggers import MetricsFile

def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def steps():
    text = file.read_text()
    assert text.endswith("\\n") and chr(0) not in text, text
    return [line.partition(",")[0] for line in text.splitlines()[1:]]

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file, row = Path(sys.argv[1], "metrics.csv"), {"images_seen": 10, "loss": 0.5}
metrics = MetricsFile(file.parent)
metrics.log_metrics(row, step=1)
room(file.stat().st_size + 3)
for step in (2, 3):
    metrics.log_metrics(row, step)
    assert steps() == ["1"], step
metrics.log_metrics({"fid_5k": 1.0}, step=4)  # a new column
assert steps() == ["1"]
resumed = MetricsFile(file.parent, resumed_at=1)
room(3)
resumed.log_metrics(row, step=2)  # the file is still that of the launch before
assert steps() == ["1"]
room(resource.RLIM_INFINITY)
metrics.log_metrics(row, step=5)
room(file.stat().st_size + 3)
metrics.log_metrics({"loss": 0.1234567890}, step=5)  # longer than what it takes the place of
metrics.log_metrics({"fid_5k": 1.0}, step=5)
assert steps() == ["1"]
room(resource.RLIM_INFINITY)
metrics.log_metrics({"fid_5k": 1.0}, step=5)  # of the step whose row is not there
assert steps() == ["1", "5"]
"""


def test_on_a_full_disk_rows_are_left_out_and_those_that_are_there_stay_whole(tmp_path: Path) -> None:
    """A file may grow to so many bytes, as on a full disk, and then further; in a process of its own."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("metrics.csv: rows are left out (File too large)") == 3


def test_a_wandb_that_does_not_answer_at_the_end_is_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    logger = WandbLogger(offline=True)
    logger.attach(tmp_path)
    logger._experiment = SimpleNamespace(finish=lambda exit_code: released.wait(60))  # type: ignore[assignment]
    monkeypatch.setattr("fmlit.training.loggers.PATIENCE", {"success": 0.2})
    started = time.monotonic()
    logger.finalize("success")
    assert time.monotonic() - started < 30
    upload = f"wandb sync --include-online {tmp_path}/wandb/run-*"  # it skips runs that were online without the option
    assert f"not answered for 0.2 s; {upload}" in caplog.text
    released.set()


def test_a_resumed_file_goes_on_without_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path)
    for step in range(1, 7):
        first.log_metrics({"images_seen": 10 * step, "loss": step / 2}, step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("7,7")  # half a row, the last thing that a killed run wrote

    resumed = MetricsFile(tmp_path, resumed_at=4)
    assert len(metrics_of(tmp_path)) == 7  # nothing is touched before there is something to write
    resumed.log_metrics({"images_seen": 60, "loss": -1.0}, step=6)
    resumed.log_metrics({"images_seen": 70, "fid_5k": 3.0}, step=7)
    assert [row["step"] for row in metrics_of(tmp_path)] == ["1", "2", "3", "4", "6", "7"]
    assert [row["loss"] for row in metrics_of(tmp_path)] == ["0.5", "1.0", "1.5", "2.0", "-1.0", ""]
    assert metrics_of(tmp_path)[-1]["fid_5k"] == "3.0"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("content", [b"", b"step,loss", b"step,loss\n\0\0\0\0", b"\xff\xfe\n\0", b"loss\n3\n"])
def test_a_damaged_file_does_not_stop_a_resume(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    MetricsFile(tmp_path, resumed_at=10).log_metrics({"loss": 0.5}, step=11)
    assert [(row["step"], row["loss"]) for row in metrics_of(tmp_path)] == [("11", "0.5")]


# W&B


def train_with_wandb(folder: Path, *args: str) -> Outcome:
    return train(folder, "--trainer.logger=fmlit.WandbLogger", *args)


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fmlit.training.loggers"]


def test_an_offline_run_holds_media_config_and_images_seen_under_one_id_across_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train_with_wandb(tmp_path, "--samples.every=320", "--trainer.logger.project=course")
    assert first.err == ""
    run = tmp_path / "runs" / "tiny"
    assert notices(caplog) == [
        f"W&B: recording offline (no API key: run wandb login or set WANDB_API_KEY); to upload: "
        f"wandb sync {run}/wandb/offline-run-*"
    ]
    again = train_with_wandb(
        tmp_path, "--samples.every=320", "--trainer.logger.project=course", "--resume", "--images=640"
    )
    assert again.summary["images_seen"] == 640
    assert len(notices(caplog)) == 2

    files = list(recorded(run))
    assert len(files) == 2
    ids = [record.run.run_id for records in files for record in records if record.WhichOneof("record_type") == "run"]
    assert set(ids) == {json.loads((run / "run.json").read_text())["wandb_id"]}
    assert {r.run.project for records in files for r in records if r.WhichOneof("record_type") == "run"} == {"course"}

    axes = [r.metric for r in files[0] if r.WhichOneof("record_type") == "metric"]
    assert [(m.glob_name, m.step_metric) for m in axes if m.glob_name] == [("*", "images_seen")]

    updates = [r.config.update for r in files[0] if r.WhichOneof("record_type") == "config"]
    config = {item.key: json.loads(item.value_json) for update in updates for item in update if item.key}
    assert config["images"] == 320
    assert config["model"]["init_args"]["net"]["init_args"] == {"width": 8, "depth": 1}

    logged = [[row["images_seen"] for row in history(records) if "loss" in row] for records in files]
    assert logged == [[80, 160, 240, 320], [400, 480, 560, 640]]
    pictures = [row for records in files for row in history(records) if row.get("samples/_type") == "image-file"]
    assert [row["images_seen"] for row in pictures] == [320, 640]
    for records, row, folder in zip(files, pictures, sorted(run.glob("wandb/offline-run-*")), strict=True):
        assert history(records)
        assert Image.open(folder / "files" / row["samples/path"]).size == (480, 480)


def test_a_server_that_does_not_answer_means_offline_and_the_key_is_written_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    outcome = train_with_wandb(tmp_path)
    assert outcome.summary["images_seen"] == 320
    assert len(notices(caplog)) == 1
    assert notices(caplog)[0].startswith("W&B: recording offline (")
    (records,) = recorded(tmp_path / "runs" / "tiny")
    assert [row["images_seen"] for row in history(records)] == [80, 160, 240, 320]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert KEY not in outcome.out + outcome.err + caplog.text


def test_a_key_that_cannot_be_one_means_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert train_with_wandb(tmp_path).code == 0
    (notice,) = notices(caplog)
    assert "recording offline" in notice
    assert "short" not in notice


def wandb_service() -> int:
    """The process id of the W&B service that this process has started."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            mine = f"PPid:\t{os.getpid()}\n" in status.read_text()
            if mine and b"wandb-core" in (status.parent / "cmdline").read_bytes():
                return int(status.parent.name)
    raise AssertionError("no service found")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to find the service")
def test_a_service_that_dies_does_not_take_the_training_along(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, calls = TrainingLog._log, []

    def kill_and_log(self: TrainingLog, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            os.kill(wandb_service(), signal.SIGKILL)
        log(self, *args)

    monkeypatch.setattr(TrainingLog, "_log", kill_and_log)
    outcome = train_with_wandb(tmp_path)
    assert outcome.summary["images_seen"] == 320
    assert len(notices(caplog)) == 2
    assert notices(caplog)[1].startswith("W&B: no longer recording this run (")
    assert [row["step"] for row in metrics_of(tmp_path / "runs" / "tiny")] == ["5", "10", "15", "20"]


def test_a_service_that_does_not_start_does_not_stop_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = wandb.init

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("mode") != "disabled":
            raise OSError("no such service")
        return init(*args, **kwargs)

    monkeypatch.setattr(wandb, "init", refuse)
    assert train_with_wandb(tmp_path).summary["images_seen"] == 320
    assert notices(caplog) == ["W&B: not recording this run (no such service)"]


@pytest.mark.parametrize("broken", ["setup", "Settings"])
def test_a_wandb_that_fails_before_it_starts_does_not_stop_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(wandb, broken, fail)
    assert train_with_wandb(tmp_path).summary["images_seen"] == 320
    assert notices(caplog) == ["W&B: not recording this run (Could not determine home directory.)"]


def test_a_user_without_a_home_gets_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    give_home()
    assert os.environ["HOME"] == "/somewhere"

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    give_home()
    assert Path(os.environ["HOME"]).parent == tmp_path


@pytest.mark.parametrize(
    ("offline", "environment", "netrc", "reason"),
    [
        (False, {}, "", "no API key"),
        (True, {"WANDB_API_KEY": KEY}, "", "as configured"),
        (False, {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "", "as configured"),
        (False, {"WANDB_API_KEY": KEY}, "", ""),
        (False, {}, f"machine wandb.example\n  login user\n  password {KEY}\n", ""),
        (False, {"WANDB_MODE": "disabled"}, "", ""),
    ],
)
def test_why_a_run_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool, environment: dict[str, str], netrc: str, reason: str
) -> None:
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    found = WandbLogger(offline=offline)._why_offline(wandb.setup().settings)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def started_run(folder: Path) -> Any:
    """The first record of a run about itself."""
    return next(r.run for records in recorded(folder) for r in records if r.WhichOneof("record_type") == "run")


def test_the_environment_of_wandb_counts_where_the_recipe_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"PROJECT": "theirs", "NAME": "brave-1", "RUN_ID": "agent77", "RUN_GROUP": "seeds", "TAGS": "a,b"}
    for name, value in names.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert train_with_wandb(tmp_path).code == 0
    run = started_run(tmp_path / "runs" / "tiny")
    assert (run.project, run.display_name, run.run_id, run.run_group) == ("theirs", "brave-1", "agent77", "seeds")
    assert list(run.tags) == ["a", "b"]
    monkeypatch.setenv("WANDB_RUN_ID", "another")  # a resumed run stays the same
    assert train_with_wandb(tmp_path, "--resume", "--images=400").code == 0
    assert json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())["wandb_id"] == "agent77"
    assert train_with_wandb(tmp_path, "--name=new", "--trainer.logger.project=ours").code == 0
    assert started_run(tmp_path / "runs" / "new").project == "ours"


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "off"), ("WANDB_BASE_URL", "localhost:8080")])
def test_settings_that_wandb_refuses_are_named_and_the_run_is_recorded_offline(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, value)
    assert train_with_wandb(tmp_path).code == 0
    (notice,) = notices(caplog)
    assert f"W&B: recording offline ({name}={value}: " in notice
    assert list(recorded(tmp_path / "runs" / "tiny"))


class Logging(pl.Callback):
    """Somebody's callback that logs by Lightning's means."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        pl_module.log("mine", float(trainer.global_step))


def test_what_others_log_joins_the_row_of_its_step(tmp_path: Path) -> None:
    outcome = train_with_wandb(tmp_path, "--trainer.callbacks=tests.training.test_loggers.Logging")
    assert outcome.code == 0
    rows = metrics_of(tmp_path / "runs" / "tiny")
    assert [(row["step"], float(row["mine"])) for row in rows] == [("5", 5), ("10", 10), ("15", 15), ("20", 20)]
    assert all(row["images_seen"] and row["loss"] for row in rows)
    (records,) = recorded(tmp_path / "runs" / "tiny")
    placed = [(row["images_seen"], row["mine"]) for row in history(records) if "mine" in row]
    assert placed == [(80, 5), (160, 10), (240, 15), (320, 20)]


def test_arguments_are_kept_as_attributes() -> None:
    logger = WandbLogger(project="p", entity="e", group="g", tags=["a"], offline=True)
    assert (logger.project, logger.entity, logger.group, logger.tags, logger.offline) == ("p", "e", "g", ["a"], True)


def test_a_wandb_that_cannot_be_imported_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train_with_wandb(tmp_path).error.startswith("trainer.logger: wandb cannot be imported")
    assert not runs_in(tmp_path)


def test_the_notice_reaches_a_user_as_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the handlers that pytest adds, the logging module prints warnings to stderr, bare."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        logger = WandbLogger(offline=True)
        logger.attach(tmp_path)
        assert logger.experiment is not None
        logger.finalize("success")
    finally:
        root.handlers = handlers
    err = capsys.readouterr().err
    assert err == f"W&B: recording offline (as configured); to upload: wandb sync {tmp_path}/wandb/offline-run-*\n"
