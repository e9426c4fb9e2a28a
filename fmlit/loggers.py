"""Loggers that survive a resume: metrics.csv in the run folder, and one W&B run per run folder."""

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from fmlit.runs import wandb_id

if TYPE_CHECKING:
    from PIL.Image import Image


class MetricsFile(CSVLogger):
    """``metrics.csv`` in the run folder, flushed at every row.

    A resumed run goes on in the same file (Lightning's own logger would delete it); rows that a killed run wrote after
    the checkpoint from which it resumes are dropped, as they will be written again.
    """

    def __init__(self, run_folder: str | Path) -> None:
        super().__init__(run_folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _ContinuedWriter(log_dir=self.log_dir)
        return self._experiment  # type: ignore[return-value]


class _ContinuedWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def save(self) -> None:
        path = Path(self.metrics_file_path)
        if self.metrics and path.is_file() and not hasattr(self, "_continued"):
            first = self.metrics[0]["step"]
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if float(row["step"] or 0) < first]
            part = path.with_suffix(".part")
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
                writer.writeheader()
                writer.writerows(kept)
            os.replace(part, path)
        self._continued = True
        super().save()


class WandbLogger(LightningWandbLogger):
    """W&B with ``images_seen`` as x-axis, one run id per run folder, and no way to stop a training run.

    The id is kept in the run folder and reused on resume. Without an API key, or when W&B cannot be reached, the run is
    recorded offline (``wandb sync`` uploads it later) and one line says so.

    Args:
        project: W&B project.
        entity: W&B team or user; the account's default if None.
        group: W&B group, e.g. for the seeds of one experiment.
        tags: W&B tags.
        offline: never try to connect.
    """

    def __init__(
        self,
        project: str = "fmlit",
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        offline: bool = False,
    ) -> None:
        super().__init__(project=project, offline=offline, entity=entity, group=group, tags=tags)
        self.project, self.entity, self.group, self.tags, self.offline = project, entity, group, tags, offline

    def attach(self, run_folder: Path) -> None:
        """Record under this run folder, as the W&B run whose id is kept there."""
        self._save_dir = str(run_folder)
        self._name = run_folder.name
        self._id = wandb_id(run_folder)
        self._wandb_init.update(dir=self._save_dir, name=self._name, id=self._id)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = self._start()
            self._experiment.define_metric("images_seen")
            self._experiment.define_metric("*", step_metric="images_seen")
        return self._experiment

    def _start(self) -> Any:
        import wandb

        mode = "offline" if self.offline else os.environ.get("WANDB_MODE")
        if mode is None and not wandb.setup().settings.api_key:
            rank_zero_info("W&B: no API key, recording offline; `wandb sync` uploads the run later")
            mode = "offline"
        arguments = {key: value for key, value in self._wandb_init.items() if key != "anonymous"}
        try:
            return wandb.init(**arguments, mode=mode)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            rank_zero_info(f"W&B: {reason}; recording offline, `wandb sync` uploads the run later")
            return wandb.init(**arguments, mode="offline")

    @rank_zero_only
    def log_picture(self, name: str, picture: "Image", images_seen: int, step: int) -> None:
        """Log one picture at this place of the x-axis."""
        import wandb

        self.log_metrics({name: wandb.Image(picture), "images_seen": images_seen}, step)  # type: ignore[dict-item]

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
