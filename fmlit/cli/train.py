"""Train an image generator by flow matching or score matching.

  train.py                                                 the quickstart: handwritten digits in a minute
  train.py --config cifar10_flow                           a recipe that comes with fmlit, by its name
  train.py --config FILE                                   a recipe of your own, a YAML file
  train.py --config FILE --model.net.channels 64           with any key changed
  train.py --config FILE --print_config                    every key and its value, without training
  train.py --config FILE --resume                          go on with the newest run of that name
  train.py --config runs/NAME/config.yaml --resume         the same, with all options that the run had

The arguments of the model, of its parts and of the data depend on their class, and are listed by
  train.py --model.help FlowMatchingModule                 ScoreMatchingModule
  train.py --model.net.help fmlit.UNet                     fmlit.MLP
  train.py --model.path.help CondOTPath                    CosinePath, PolynomialPath, VPPath
  train.py --model.optimizer.help fmlit.Muon               fmlit.AdamW, fmlit.TorchOptimizer
  train.py --data.help CIFAR10                             Digits, MNIST, ImageFolder, ...
  train.py --samples.sampler.help ODESampler               SDESampler
  train.py --trainer.logger.help fmlit.WandbLogger
"""

import contextlib
import json
import math
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import Precision

import fmlit
from fmlit.cli import errors, recipes
from fmlit.cli.loggers import as_list, build_loggers
from fmlit.cli.parsing import LINKS, Parser, check_arguments, check_network, switch_on, tidy
from fmlit.cli.run_options import MANAGED_TRAINER_OPTIONS, RunOptions
from fmlit.core.errors import LostProcessError, UserError
from fmlit.core.files import atomic_write, expand, file_errors
from fmlit.data.data_module import DataModule
from fmlit.storage import lease
from fmlit.storage.checkpoints import AtomicCheckpointIO
from fmlit.storage.run_folder import RunFolder
from fmlit.training import trainer_settings
from fmlit.training.callbacks import Preempted, ProgressBar, TrainingLog
from fmlit.training.launch import begin
from fmlit.training.lightning_internals import exit_at_once
from fmlit.training.loggers import MetricsFile
from fmlit.training.modules import GenerativeModule
from fmlit.training.rendezvous import agree
from fmlit.training.resume import Start, find_start, take_weights
from fmlit.training.signals import end_at_first_signal
from fmlit.training.summary import Parts, describe_run, quiet_logging, summarize_run

PARTS: dict[str, type[pl.Callback]] = Parts.__annotations__
MEMORY = "lower data.batch_size (while scoring quality.batch_size), or raise trainer.accumulate_grad_batches"
TRAINER_ERRORS = (ValueError, TypeError, ImportError, MisconfigurationException)  # of options that do not fit
GLOO_ERROR = re.compile(r"\[\S*/gloo/")  # gloo's errors start with the file that raises them


class RunConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder, and hands the configuration to every logger.

    Not before a checkpoint is restored, as Lightning does: a resume that fails leaves the run's own file alone.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        path = RunFolder(Path(trainer.default_root_dir)).config
        with file_errors(path), atomic_write(path) as file:
            file.write(self.parser.dump(self.config, skip_unset=False).encode())
        config = yaml.safe_load(self.parser.dump(self.config))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


class TrainingCLI(LightningCLI):
    """Parses, builds model and data, claims the run folder, builds the trainer. ``fit`` trains."""

    run_folder: RunFolder
    start = Start()
    _fresh = False  # whether this launch has made the folder
    _loggers: Any = None  # their configuration
    fit_seconds = math.inf

    def __init__(self, args: Sequence[str], program: str = "train.py") -> None:
        args = switch_on(recipes.resolve(tidy(args)), {"--resume"})
        check_arguments(args)
        self._args = args
        self._stem = next((path.stem for path in recipes.config_files(args)), "run")
        super().__init__(
            GenerativeModule,
            DataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            parser_kwargs={
                "description": (__doc__ or "").replace("train.py", program),  # the docstring of this file
                "usage": f"{program} [--config NAME] [--KEY VALUE ...]",
                "dump_header": [f"fmlit {fmlit.__version__}, lightning {pl.__version__}, torch {torch.__version__}"],
            },
            save_config_callback=RunConfig,
            save_config_kwargs={"save_to_log_dir": False},  # but atomically, and again where a run is resumed
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # checkpoints carry a plain description instead
            run=False,
            args=args,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(
            pl.Trainer, "trainer", skip=MANAGED_TRAINER_OPTIONS, instantiate=False, fail_untyped=False, sub_configs=True
        )
        parser.add_lightning_class_args(GenerativeModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(DataModule, "data", subclass_mode=True)
        for key, cls in PARTS.items():
            parser.add_lightning_class_args(cls, key)
        for key, source in LINKS.items():
            owner, _, name = key.partition(".")
            when = "instantiate" if source.startswith("data.") else "parse"
            parser.link_arguments(source, f"{owner}.init_args.{name}", apply_on=when)

    def before_instantiate_classes(self) -> None:
        if self.config["images"] < 1:
            raise UserError(f"images: a run has at least 1 training image, got {self.config['images']}")
        trainer_settings.check_trainer(self.config["trainer"])
        check_network(self.config)
        self._loggers, self.config["trainer"]["logger"] = self.config["trainer"]["logger"], None

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except BaseException:  # a signal, too
            self.discard()
            raise
        if self.config["quality"]["sampler"] is None:
            self.config_init["quality"].sampler = self.config_init["samples"].sampler

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        self.model.name_classes(self.datamodule)  # before a resume compares them
        self.config["trainer"]["logger"] = self._loggers  # which need the run folder
        resume, self.config["resume"] = self.config["resume"], False  # config.yaml starts a run of its own
        self.config["name"] = self.config["name"] or self._stem
        root, name = expand(self.config["runs"], "runs"), self.config["name"]
        root = root.absolute() if str(root).startswith("~") else root  # of ./~, which Lightning must not expand
        terms = lease.Terms(self.config["lease_expiry"], self.config["lease_wait"])
        self.run_folder, resumed = begin(root, name, resume, self._own_folder(root, name), terms)
        self._fresh = not resumed
        if resumed:
            self.start = Start(*agree(lambda: find_start(self.run_folder, self.model, resume is True)))
        weights = self.config["start_from"]
        if weights is not None and self.start.checkpoint is None:  # a requeued job may have none yet
            take_weights(weights, self.model)
            self.start = Start(weights=weights)
        trainer = self._build_trainer(**self._settings(), **kwargs)
        self._check_processes(trainer)
        return trainer

    def _own_folder(self, root: Path, name: str) -> RunFolder | None:
        """The run whose own config.yaml is on the command line, unless that names another run as well."""
        folders = [RunFolder(path.parent) for path in recipes.config_files(self._args) if path.name == "config.yaml"]
        named_root = any(arg.startswith("--runs") for arg in self._args)
        for folder in reversed(folders):
            here = not named_root or folder.path.resolve().parent == root.resolve()
            if here and folder.read_record().get("name") == name:
                return folder
        return None

    def _build_trainer(self, **settings: Any) -> pl.Trainer:
        try:
            with trainer_settings.static_graph_ddp():
                trainer = super().instantiate_trainer(**settings)
            trainer_settings.check_launcher(trainer)
            return trainer
        except TRAINER_ERRORS as error:
            raise UserError(f"trainer: {error}") from error

    def _settings(self) -> dict[str, Any]:
        """What is not left to the user, and the user's lists with ours added."""
        given = self.config_init["trainer"]
        steps = given["max_steps"]
        if steps == -1:
            left = max(0, self.config["images"] - self.start.images)
            steps = self.start.step + math.ceil(left / self.datamodule.batch_size)
        callbacks, plugins = (as_list(given[key]) for key in ("callbacks", "plugins"))
        loggers = build_loggers(self._loggers, self.run_folder)
        trainer_settings.check_callbacks(callbacks)
        for logger in loggers:
            if hasattr(logger, "attach"):
                logger.attach(self.run_folder)
        bar = [] if given["enable_progress_bar"] is False else [ProgressBar()]
        precision = given["precision"]
        if not (precision or any(isinstance(plugin, Precision) for plugin in plugins)):
            precision = trainer_settings.default_precision(given["accelerator"])
        return {
            "default_root_dir": str(self.run_folder),
            "enable_checkpointing": False,  # ours is a callback of its own
            "enable_model_summary": False,
            "use_distributed_sampler": False,  # the data modules deal images to ranks themselves
            "max_epochs": -1,
            "max_steps": steps,
            **trainer_settings.match_launcher(given),
            "precision": precision,
            "logger": [MetricsFile(self.run_folder, self.start.step), *loggers],
            "callbacks": [*callbacks, TrainingLog(), *bar],
            "plugins": [*plugins, *trainer_settings.cluster_plugins(plugins), AtomicCheckpointIO()],
        }

    def _check_processes(self, trainer: pl.Trainer) -> None:
        """Raise a UserError now, before other processes are launched, rather than in each of them."""
        trainer_settings.check_launch(trainer.world_size)
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
        started = time.perf_counter()
        try:
            if self.trainer.is_global_zero:
                print(describe_run(self.run_folder, self.trainer, self.model, self.datamodule, self.start), flush=True)
            with self.parts.preemption.watch_signals(self._end_at_once):
                self.trainer.fit(self.model, self.datamodule, ckpt_path=self.start.checkpoint, weights_only=True)
        except RuntimeError as error:
            if not (isinstance(error, torch.distributed.DistError) or GLOO_ERROR.match(str(error))):
                raise
            reason = str(error).splitlines()[0].partition(". ")[0]
            raise LostProcessError(f"lost another process, which says why or was killed ({reason})") from error
        finally:
            self.fit_seconds = time.perf_counter() - started
            if self.trainer.global_step == 0:
                self.discard()

    def discard(self) -> None:
        """Remove the run folder, if this process made it and nothing was saved there."""
        if self._fresh and not errors.process_rank():
            lease.abandon(self.run_folder)

    def _end_at_once(self, code: int) -> None:
        """End the process, from any thread. An unused run folder goes, where the disk answers within seconds."""
        if self.trainer.global_step == 0:
            (removal := threading.Thread(target=self.discard, daemon=True)).start()
            removal.join(5)
        exit_at_once(code)


def train(args: Sequence[str], default_config: Path = recipes.QUICKSTART, program: str = "train.py") -> None:
    """Train by a command line. Its last line of output is JSON.

    Args:
        args: the command line.
        default_config: a recipe that is put in front where the command line names none. As defaults of the parser, its
            values would leak into other recipes.
        program: how the user has started it.
    """
    started = time.perf_counter()
    if not recipes.config_files(args) and not {"-c", "--config"} & set(args):
        args = ["--config", str(default_config), *args]
    with quiet_logging(), contextlib.ExitStack() as ending:
        ending.callback(lease.release)
        preempted = None
        with errors.one_line_errors(MEMORY), end_at_first_signal(sys.exit):
            cli = TrainingCLI(args, program)
            try:
                cli.fit()
            except Preempted as error:
                preempted = error
    if cli.trainer.is_global_zero:
        seconds = time.perf_counter() - started
        summary = summarize_run(cli.run_folder, cli.model, cli.start, cli.parts, seconds, cli.fit_seconds)
        if preempted:
            print(preempted, file=sys.stderr)
            summary["preempted"] = preempted.signal
        elif (done := cli.trainer.global_step) < cli.trainer.max_steps:  # by trainer.max_time, or a callback
            print(f"ended after {done:,} of {cli.trainer.max_steps:,} steps; --resume goes on", file=sys.stderr)
        print(json.dumps(summary), flush=True)
    if preempted:
        raise SystemExit(preempted.exit_code)
