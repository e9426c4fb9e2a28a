"""The command line of training: a LightningCLI with a run folder, links from data to model, and one-line errors."""

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import fmlit
from fmlit.cli import errors, recipes
from fmlit.cli.parsing import HELP, Parser, check_arguments, check_network, config_files
from fmlit.core.errors import LostProcessError, UserError
from fmlit.data.data_module import DataModule
from fmlit.storage.checkpoints import AtomicCheckpointIO
from fmlit.storage.run_folder import RunFolder, expand_root
from fmlit.training.callbacks import Preempted, ProgressBar, TrainingLog
from fmlit.training.launch import begin
from fmlit.training.loggers import MetricsFile
from fmlit.training.modules import GenerativeModule
from fmlit.training.rendezvous import agree
from fmlit.training.resume import Start, find_start, take_weights
from fmlit.training.summary import Parts, describe_run, quiet_logging, summarize_run
from fmlit.training.trainer_settings import (
    check_launch,
    check_launcher,
    check_trainer,
    cluster_plugins,
    default_precision,
    match_launcher,
    static_graph_ddp,
)

# Trainer options that would be accepted and then ignored: the stream of batches is endless and its length is in images,
# there is no validation loop, and run folder, checkpoints and their hash are ours.
MANAGED_TRAINER_OPTIONS = {
    *("default_root_dir", "enable_checkpointing", "enable_model_summary", "enable_autolog_hparams", "model_registry"),
    *("use_distributed_sampler", "reload_dataloaders_every_n_epochs", "inference_mode", "barebones", "fast_dev_run"),
    *("max_epochs", "min_epochs", "min_steps", "limit_train_batches", "overfit_batches"),
    *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "num_sanity_val_steps"),
    *("val_check_interval", "check_val_every_n_epoch"),
}

PARTS: dict[str, type[pl.Callback]] = Parts.__annotations__
MEMORY = "lower data.batch_size (while scoring quality.batch_size), or raise trainer.accumulate_grad_batches"
TRAINER_ERRORS = (ValueError, TypeError, ImportError, MisconfigurationException)  # of options that do not fit
PREEMPTED = 128 + signal.SIGTERM  # the exit code, whichever signal it was: what schedulers take for an ended job


class RunConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder, and hands the configuration to every logger.

    Not before a checkpoint is restored, as Lightning does: a resume that fails leaves the run's own file alone.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        config = yaml.safe_load(self.parser.dump(self.config))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


class TrainingCLI(LightningCLI):
    """Parses, builds model and data, claims the run folder, builds the trainer. ``fit`` trains."""

    run_folder: RunFolder
    start = Start()
    _fresh = True
    fit_seconds = math.inf

    def __init__(self, args: Sequence[str], program: str = "train.py") -> None:
        args = recipes.resolve(args)
        check_arguments(args)
        self._stem = next((path.stem for path in config_files(args)), "run")
        super().__init__(
            GenerativeModule,
            DataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            parser_kwargs={
                "description": HELP.replace("train.py", program),
                "usage": f"{program} [--config NAME] [--KEY VALUE ...]",
                "dump_header": [f"fmlit {fmlit.__version__}, lightning {pl.__version__}, torch {torch.__version__}"],
            },
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},  # a resumed run writes it again
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # checkpoints carry a plain description instead
            run=False,
            args=args,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=int, default=0, help="Seed of everything that is drawn.")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(
            pl.Trainer, "trainer", skip=MANAGED_TRAINER_OPTIONS, instantiate=False, fail_untyped=False, sub_configs=True
        )
        parser.add_lightning_class_args(GenerativeModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(DataModule, "data", subclass_mode=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, help="Name of the run (default: the name of the YAML file).")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs; ~ and $VAR are expanded.")
        parser.add_argument(
            "--resume",
            type=bool | Literal["auto"],
            nargs="?",
            const=True,
            default=False,
            help="Go on with the newest run of this name; auto: if there is one, for jobs that are started again.",
        )
        parser.add_argument(
            "--start_from",
            type=str | None,
            help="Start a new run from trained weights: a checkpoint (its first average), the folder of a run, or one "
            "that was exported. A resumed run does not read it.",
        )
        parser.add_argument("--images", type=int, default=1_000_000, help="Run length in training images.")
        for key, cls in PARTS.items():
            parser.add_lightning_class_args(cls, key)
        parser.link_arguments("images", "model.init_args.schedule.images")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("data.shape", "model.init_args.shape", apply_on="instantiate")
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        if self.config["images"] < 1:
            raise UserError(f"images: a run has at least 1 training image, got {self.config['images']}")
        check_trainer(self.config["trainer"])
        check_network(self.config)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.config["quality"]["sampler"] is None:
            self.config_init["quality"].sampler = self.config_init["samples"].sampler

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        resume, self.config["resume"] = self.config["resume"], False  # config.yaml starts a run of its own
        self.config["name"] = self.config["name"] or self._stem
        self.run_folder, resumed = begin(expand_root(self.config["runs"]), self.config["name"], resume)
        self._fresh = not resumed
        try:
            if resumed:
                self.start = Start(*agree(lambda: find_start(self.run_folder, self.model, resume is True)))
            weights = self.config["start_from"]
            if weights is not None and self.start.checkpoint is None:  # a requeued job may have none yet
                take_weights(weights, self.model)
                self.start = Start(weights=weights)
            trainer = self._build_trainer(**self._trainer_settings(), **kwargs)
            self._check_processes(trainer)
        except BaseException:
            self.discard()
            raise
        return trainer

    def _build_trainer(self, **settings: Any) -> pl.Trainer:
        try:
            with static_graph_ddp():
                trainer = super().instantiate_trainer(**settings)
            check_launcher(trainer)
            return trainer
        except TRAINER_ERRORS as error:
            raise UserError(f"trainer: {error}") from error

    def _trainer_settings(self) -> dict[str, Any]:
        """What is not left to the user, and the user's lists with ours added."""
        given = self.config_init["trainer"]
        steps = given["max_steps"]
        if steps == -1:
            left = max(0, self.config["images"] - self.start.images)
            steps = self.start.step + math.ceil(left / self.datamodule.batch_size)
        given_loggers = given["logger"] if isinstance(given["logger"], list) else [given["logger"]]
        loggers = [logger for logger in given_loggers if not isinstance(logger, bool | None)]
        for logger in loggers:
            if hasattr(logger, "attach"):
                logger.attach(self.run_folder)
        callbacks = given["callbacks"] if isinstance(given["callbacks"], list) else [given["callbacks"]]
        bar = [] if given["enable_progress_bar"] is False else [ProgressBar()]
        plugins = given["plugins"] if isinstance(given["plugins"], list) else [given["plugins"]]
        chosen = any(isinstance(plugin, Precision) for plugin in plugins)
        return {
            "default_root_dir": str(self.run_folder),
            "enable_checkpointing": False,  # ours is a callback of its own
            "enable_model_summary": False,
            "use_distributed_sampler": False,  # the data modules deal images to ranks themselves
            "max_epochs": -1,
            "max_steps": steps,
            **match_launcher(given),
            "precision": given["precision"] or (None if chosen else default_precision(given["accelerator"])),
            "logger": [MetricsFile(self.run_folder, self.start.step), *loggers],
            "callbacks": [*filter(None, callbacks), TrainingLog(), *bar],
            "plugins": [*filter(None, plugins), *cluster_plugins(plugins), AtomicCheckpointIO()],
        }

    def _check_processes(self, trainer: pl.Trainer) -> None:
        """Raise a UserError now, before other processes are launched, rather than in each of them."""
        check_launch(trainer.world_size)
        self.datamodule.trainer = trainer
        try:
            self.datamodule.rank_slice()
        except UserError as error:
            raise UserError(f"data.{error}") from error

    @property
    def parts(self) -> Parts:
        """The callbacks of the configuration."""
        return Parts(**{key: self.config_init[key] for key in PARTS})

    def fit(self) -> None:
        """Train. A run folder in which nothing was learned is removed again."""
        if self.trainer.is_global_zero:
            print(describe_run(self.run_folder, self.trainer, self.model, self.datamodule, self.start), flush=True)
        started = time.perf_counter()
        try:
            with self.parts.preemption.watch_signals():
                self.trainer.fit(self.model, self.datamodule, ckpt_path=self.start.checkpoint, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C
            if self.trainer.is_global_zero and self.trainer.global_step:
                newest = self.parts.checkpoint.newest or self.start.checkpoint
                goes_on = f"--resume goes on from {newest}" if newest else "nothing had been saved yet"
                print(f"interrupted after {self.model.images_seen:,} images; {goes_on}", file=sys.stderr)
            raise
        except RuntimeError as error:
            if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
                raise
            reason = str(error).splitlines()[0].partition(". ")[0]
            raise LostProcessError(f"lost another process, which says why or was killed ({reason})") from error
        finally:
            self.fit_seconds = time.perf_counter() - started
            if self.trainer.global_step == 0:
                self.discard()

    def discard(self) -> None:
        """Remove the run folder, if this process made it and nothing was saved there."""
        if self._fresh and not self.run_folder.has_checkpoints() and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            shutil.rmtree(self.run_folder, ignore_errors=True)


def train(args: Sequence[str], default_config: Path = recipes.QUICKSTART, program: str = "train.py") -> None:
    """``fmlit train``: train by command line, then print one line of JSON.

    Without ``--config``, ``default_config`` is put in front. A default of the parser would leak into other recipes.
    """
    started = time.perf_counter()
    if not config_files(args) and not {"-c", "--config"} & set(args):
        args = ["--config", str(default_config), *args]
    with quiet_logging():
        preempted = None
        with errors.one_line_errors(MEMORY):
            cli = TrainingCLI(args, program)
            try:
                cli.fit()
            except Preempted as error:
                preempted = error
    if cli.trainer.is_global_zero:
        seconds = time.perf_counter() - started
        summary = summarize_run(cli.run_folder, cli.model, cli.start, cli.parts, seconds, cli.fit_seconds)
        if preempted:
            print(f"preempted by {preempted}", file=sys.stderr)
            summary["preempted"] = preempted.signal
        elif (done := cli.trainer.global_step) < cli.trainer.max_steps:  # by trainer.max_time, or a callback
            print(f"ended after {done:,} of {cli.trainer.max_steps:,} steps; --resume goes on", file=sys.stderr)
        print(json.dumps(summary), flush=True)
    if preempted:
        raise SystemExit(PREEMPTED)
