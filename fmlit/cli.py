"""The command line of training: a LightningCLI with a run folder, links from data to model, and one-line errors."""

import itertools
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from fmlit import errors, runs
from fmlit.callbacks import EMA, Checkpoint, ProgressBar, QualityCurve, SampleGrid, TrainingLog
from fmlit.checkpoints import AtomicCheckpointIO, newest_valid
from fmlit.data.base import DataModule
from fmlit.loggers import MetricsFile
from fmlit.modules import GenerativeModule

HELP = """Train an image generator by flow matching or score matching.

Options are typed constructor arguments, from YAML files (--config, later ones win) or from the command line
(--model.net.channels 64). The arguments of a chosen class are listed by
  --model.help FlowMatchingModule   --model.net.help fmlit.networks.UNet   --data.help CIFAR10   --trainer.help
"""


class Parser(LightningArgumentParser):
    """Errors in one line, with the nearest known option."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        errors.exit_with(message, [action.dest for action in self._actions])


class TrainingCLI(LightningCLI):
    """Parses, builds model and data, claims the run folder, builds the trainer. ``fit`` trains."""

    run_folder: Path
    resume_from: str | None = None

    def __init__(self, args: Sequence[str]) -> None:
        configs = [b for a, b in itertools.pairwise(args) if a in ("-c", "--config")]
        configs += [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
        self._stem = Path(configs[0]).stem if configs else "run"
        super().__init__(
            GenerativeModule,
            DataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            parser_kwargs={"description": HELP},
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},  # a resumed run writes it again
            trainer_defaults={
                "max_epochs": -1,  # the run length is in images
                "use_distributed_sampler": False,  # the data modules deal images to ranks themselves
                "enable_model_summary": False,
                "log_every_n_steps": 50,
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # checkpoints carry a plain description instead
            run=False,
            args=list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, help="Name of the run (default: the name of the YAML file).")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument("--resume", action="store_true", help="Go on with the newest run of this name.")
        parser.add_argument("--images", type=int, default=1_000_000, help="Run length in training images.")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(SampleGrid, "samples")
        parser.add_lightning_class_args(QualityCurve, "quality")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.link_arguments("images", "model.init_args.images")
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("data.shape", "model.init_args.shape", apply_on="instantiate")
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        settings = self.config_init["trainer"]
        if settings["max_steps"] == -1:
            settings["max_steps"] = math.ceil(self.config["images"] / self.datamodule.batch_size)
        elif settings["max_steps"] < 1:
            raise ValueError(f"trainer.max_steps must be at least 1, got {settings['max_steps']}")
        choice = json.loads(runs.agree(self._choose_run_folder))
        self.run_folder, self.resume_from = Path(choice["folder"]), choice["checkpoint"]
        loggers = settings["logger"] if isinstance(settings["logger"], list) else [settings["logger"]]
        loggers = [MetricsFile(self.run_folder), *(logger for logger in loggers if not isinstance(logger, bool | None))]
        for logger in loggers:
            if hasattr(logger, "attach"):
                logger.attach(self.run_folder)
        settings["logger"] = loggers
        settings["default_root_dir"] = str(self.run_folder)
        settings["enable_checkpointing"] = False  # ours is a callback of its own
        settings["plugins"] = [*(settings["plugins"] or []), AtomicCheckpointIO()]
        settings["callbacks"] = [*(settings["callbacks"] or []), TrainingLog(), ProgressBar()]
        try:
            return super().instantiate_trainer(**kwargs)
        except BaseException:
            self.discard()
            raise

    def _choose_run_folder(self) -> str:
        """Rank 0's decision, as JSON: a new folder, or the newest of that name with its newest checkpoint."""
        root, name = Path(self.config["runs"]), self.config["name"] or self._stem
        if not self.config["resume"]:
            return json.dumps({"folder": str(runs.claim(root, name)), "checkpoint": None})
        folder = runs.newest(root, name)
        return json.dumps({"folder": str(folder), "checkpoint": str(newest_valid(folder / "checkpoints"))})

    def fit(self) -> None:
        """Train. A run folder in which nothing was learnt is removed again."""
        if self.trainer.is_global_zero:
            print(self._headline(), flush=True)
        try:
            self.trainer.fit(self.model, self.datamodule, ckpt_path=self.resume_from, weights_only=True)
        except BaseException:
            if self.model.images_seen == 0:
                self.discard()
            raise

    def discard(self) -> None:
        """Remove the run folder, if this process made it."""
        if self.resume_from is None and runs.is_main_process():
            shutil.rmtree(self.run_folder, ignore_errors=True)

    def _headline(self) -> str:
        model = self.model.model
        parameters = sum(p.numel() for p in model.net.parameters()) / 1e6
        steps, batch = self.trainer.max_steps, self.datamodule.batch_size
        return (
            f"{self.run_folder}: {type(self.model).__name__}, {type(model.path).__name__}, "
            f"{type(model.net).__name__} of {parameters:.2f} M parameters on {type(self.datamodule).__name__}; "
            f"{steps * batch:,} images in {steps:,} steps of {batch}"
            + (f"; resumed from {self.resume_from}" if self.resume_from else "")
        )

    def summary(self, seconds: float) -> dict[str, Any]:
        """What other programs want to know of the finished run."""
        callbacks = {type(c): c for c in self.trainer.callbacks}
        newest = {"samples": callbacks[SampleGrid].newest, "checkpoint": callbacks[Checkpoint].newest}
        return {
            "run": str(self.run_folder),
            "images_seen": self.model.images_seen,
            "steps": self.trainer.global_step,
            "seconds": round(seconds, 1),
            "loss": callbacks[TrainingLog].latest.get("loss"),
            **{name: str(path) if path else None for name, path in newest.items()},
            **callbacks[QualityCurve].latest,
        }


def train(args: Sequence[str], default_config: Path) -> None:
    """``scripts/train.py``: train by command line, then print one line of JSON.

    Without ``--config``, ``default_config`` is put in front. It is no default of the parser, whose values would leak
    into every other recipe.
    """
    started = time.perf_counter()
    if not any(arg in ("-c", "--config") or arg.startswith("--config=") for arg in args):
        args = ["--config", str(default_config), *args]
    _quieten()
    with errors.one_line_errors():
        cli = TrainingCLI(args)
        cli.fit()
    if cli.trainer.is_global_zero:
        print(json.dumps(cli.summary(time.perf_counter() - started)), flush=True)


def _quieten() -> None:
    """Drop Lightning's advice that does not hold here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for advice in (
        ".*args parameter is intended to run from within Python.*",
        ".*does not have many workers.*",  # a batch is one indexing operation
        ".*`tensorboardX` has been removed.*",
        ".*treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", advice)
