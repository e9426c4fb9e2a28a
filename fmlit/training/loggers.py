"""Loggers that survive a resume: metrics.csv in the run folder, and one W&B run per run folder."""

import contextlib
import csv
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL.Image import Image

from fmlit.core.errors import UserError, first_line
from fmlit.core.files import atomic_write, check_owner
from fmlit.storage.run_folder import RunFolder
from fmlit.training.lightning_internals import RelocatableWandbLogger
from fmlit.training.wandb_environment import drop_refused_settings, give_home

log = logging.getLogger(__name__)

# Seconds that W&B has for its last upload: fewer where a job may soon be killed, and has to be requeued before.
PATIENCE = {"success": 120.0, "failed": 30.0}


class MetricsFile(Logger):
    """``metrics.csv`` in the run folder: a row per step, on the disk as soon as it is logged.

    A resumed run goes on in the same file, without the rows that the killed run wrote after the checkpoint. Values of
    ``self.log`` join the row of their step; Lightning counts the steps before it, and there is one epoch. Lightning's
    CSVLogger would delete the file, writes two rows where two callbacks log at one step, and rewrites the file in place
    when a new column comes.

    Args:
        run_folder: where the file is.
        resumed_at: rows after this step are dropped from a file that is there already.
    """

    version = ""

    def __init__(self, run_folder: str | os.PathLike[str], resumed_at: int = 0) -> None:
        super().__init__()
        self.run_folder, self.resumed_at = RunFolder(Path(run_folder)), resumed_at
        self.path = self.run_folder.metrics
        self._columns: list[str] = []
        self._last: dict[str, Any] = {}
        self._size = 0  # of the file without its last row
        self._failing = False

    @property
    def name(self) -> str:
        return self.run_folder.path.name

    @property
    def save_dir(self) -> str:
        return str(self.run_folder)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` beside the file has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a row, or complete the last one if that is of the same step. On a full disk rows are left out."""
        if "epoch" in metrics and step is not None:  # Lightning adds it to what self.log collects
            metrics, step = {name: value for name, value in metrics.items() if name != "epoch"}, step + 1
        try:
            self._write(metrics, step)
        except OSError as error:  # whether a full disk ends the run, checkpoints say
            if not self._failing:
                log.warning("%s: rows are left out (%s)", self.path, error.strerror or error)
            self._failing, self._last = True, {}
        else:
            self._failing = False

    def _write(self, metrics: Mapping[str, float], step: int | None) -> None:
        if not self._columns:
            rows = self._kept_rows()
            self._rewrite(rows)
            self._last = {**rows[-1], "step": int(rows[-1]["step"])} if rows else {}
        same = step is not None and self._last.get("step") == step
        self._last = {**(self._last if same else {}), "step": step, **metrics}
        if any(column not in self._columns for column in self._last):
            self._rewrite([*read_rows(self.path)[: -1 if same else None], self._last])
            return
        if not same:
            self._size = self.path.stat().st_size
        with self.path.open("r+b", buffering=0) as file:
            check_owner(self.path)
            try:
                file.truncate(self._size)
                file.seek(self._size)
                row = _lines(self._columns, [self._last])
                while row:  # a full disk takes a part, and says why at the next try
                    row = row[file.write(row) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(self._size)  # the half of a row
                raise

    def _kept_rows(self) -> list[dict[str, str]]:
        """The rows of an interrupted run up to where it is resumed; a half-written one is none of them."""
        steps = [(row, row.get("step") or "") for row in read_rows(self.path)]
        return [row for row, step in steps if step.isdecimal() and int(step) <= self.resumed_at]

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        """Atomically replace the file by one with the columns of these rows."""
        columns = list(dict.fromkeys(["step", "images_seen", *(column for row in rows for column in row)]))
        head = _lines(columns, [{column: column for column in columns}, *rows[:-1]])
        with atomic_write(self.path) as file:
            file.write(head + _lines(columns, rows[-1:]))
        self._columns, self._size = columns, len(head)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv. One that is half-written is left out, and one that is damaged too, with a warning."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(errors="replace").split("\n")
    whole = [line for line in lines if "\0" not in line and len(line) < csv.field_size_limit()]
    if len(whole) < len(lines):
        log.warning("%s: dropped %d damaged rows", path, len(lines) - len(whole))
    return list(csv.DictReader(whole))


def _lines(columns: list[str], rows: list[dict[str, Any]]) -> bytes:
    lines = io.StringIO(newline="")
    csv.DictWriter(lines, columns, lineterminator="\n").writerows(rows)
    return lines.getvalue().encode()


class WandbLogger(RelocatableWandbLogger):
    """W&B with ``images_seen`` as x-axis, one run id per run folder, and no way to stop a training run.

    The id is kept in the run folder and reused on resume. A new run takes name and id from ``WANDB_NAME`` and
    ``WANDB_RUN_ID``. Other variables of W&B count where the recipe says nothing. Without an API key, or when W&B cannot
    be reached, the run is recorded offline and one line says how to upload it later. If W&B fails in the middle,
    training goes on without it.

    Args:
        project: W&B project; by default that of the environment, or "fmlit".
        entity: W&B team or user; the account's default if None.
        group: W&B group, e.g. for the seeds of one experiment.
        tags: W&B tags.
        offline: never try to connect.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        offline: bool = False,
    ) -> None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UserError(f"wandb cannot be imported ({error}): install it, or leave this logger out") from error
        name = project or os.environ.get("WANDB_PROJECT") or "fmlit"
        super().__init__(project=name, offline=offline, entity=entity, group=group, tags=tags)
        self.project, self.entity, self.group, self.tags, self.offline = project, entity, group, tags, offline
        self.failed = False  # then nothing is recorded any more
        self._images_seen = 0

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; one that records nothing if W&B does not even start offline."""
        if self.started_run is None:
            folder = Path(self.save_dir or ".")
            run_id = RunFolder(folder).wandb_id(os.environ.get("WANDB_RUN_ID"))
            try:
                run = self.started_run = self._start(folder, run_id)
                run.define_metric("images_seen")
                run.define_metric("*", step_metric="images_seen")
            except Exception as error:  # whatever it is, training goes on
                log.warning("W&B: not recording this run (%s)", first_line(error))
                self.started_run, self.failed = DummyLogger().experiment, True
        return self.started_run

    def _start(self, folder: Path, run_id: str) -> Any:
        os.environ.setdefault("WANDB__SERVICE_WAIT", "300")  # its service takes minutes to start on a busy file system
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # for a server that does not answer; 90 s by default
        give_home()
        import wandb

        refused = drop_refused_settings()
        arguments = {key: value for key, value in self.init_arguments.items() if key != "anonymous"}
        arguments |= {"dir": str(folder), "name": os.environ.get("WANDB_NAME") or folder.name, "id": run_id}
        reason = refused or self._why_offline(wandb.setup().settings)
        if not reason:
            try:
                return wandb.init(**arguments)
            except Exception as error:
                reason = first_line(error)
                wandb.teardown()  # else the id stays in use
        run = wandb.init(**arguments, mode="offline", settings=wandb.Settings(silent=True))
        # All of them: a resumed run writes another file, and they are uploaded together, in order.
        log.warning("W&B: recording offline (%s); to upload: wandb sync %s/wandb/offline-run-*", reason, folder)
        return run

    def _why_offline(self, settings: Any) -> str:
        """Why not to connect; empty where there is no reason not to."""
        if self.offline or settings.mode == "offline":
            return "as configured"
        if settings.mode != "online" or settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
            return ""
        from requests.utils import get_netrc_auth  # where `wandb login` puts the key; wandb depends on requests

        return "" if get_netrc_auth(settings.base_url) else "no API key: run wandb login or set WANDB_API_KEY"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._images_seen = int(metrics.get("images_seen", self._images_seen))
        placed = {**metrics, "images_seen": self._images_seen}  # also what others log with self.log
        self._guard(lambda: super(WandbLogger, self).log_metrics(placed, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        self._guard(lambda: super(WandbLogger, self).log_hyperparams(params))

    @rank_zero_only
    def log_picture(self, name: str, picture: Image, images_seen: int, step: int) -> None:
        """Log one picture at this place of the x-axis."""

        def send() -> None:
            import wandb

            self.experiment.log({name: wandb.Image(picture), "images_seen": images_seen, "trainer/global_step": step})

        self._guard(send)

    @rank_zero_only
    def mark_preempting(self) -> None:
        """Tell W&B that the run will end with an error that is none, and be resumed."""
        self._guard(lambda: self.experiment.mark_preempting())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload what is left, and end the W&B run; without it, where its server does not answer."""
        seconds = PATIENCE["success" if status == "success" else "failed"]
        if (run := self.started_run) is not None:
            upload = f"wandb sync --include-online {self.save_dir or '.'}/wandb/run-* uploads what it has not got"
            self._guard(lambda: _within(seconds, lambda: run.finish(exit_code=int(status != "success")), upload))

    def _guard(self, action: Callable[[], None]) -> None:
        """Do it, unless W&B has failed before."""
        if not self.failed:
            try:
                action()
            except Exception as error:  # W&B's service can die at any time, and training must not die with it
                self.failed = True
                log.warning("W&B: no longer recording this run (%s); metrics.csv goes on", first_line(error))
                with contextlib.suppress(Exception, SystemExit):
                    sys.modules["wandb"].teardown()


def _within(seconds: float, action: Callable[[], None], otherwise: str) -> None:
    """Do it in a thread, which is left alone if it takes longer.

    Raises:
        TimeoutError: it did.
        Exception: its own.
    """
    raised: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"its server has not answered for {seconds:g} s; {otherwise}")
    if raised:
        raise raised[0]
