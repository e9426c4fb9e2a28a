"""What a run says of itself: one line when it starts, one of JSON when it ends, and little else."""

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import lightning.pytorch as pl

from fmlit.data.data_module import DataModule
from fmlit.training.callbacks import Checkpoint, QualityCurve, SampleGrid, TrainingLog
from fmlit.training.callbacks.intervals import EveryImages
from fmlit.training.modules import GenerativeModule
from fmlit.training.resume import Start

C = TypeVar("C", bound=pl.Callback)


def callback(trainer: pl.Trainer, kind: type[C]) -> C:
    """The trainer's callback of that class."""
    return next(c for c in trainer.callbacks if isinstance(c, kind))  # type: ignore[attr-defined]


def headline(trainer: pl.Trainer, module: GenerativeModule, data: DataModule, start: Start) -> str:
    """What is going to be trained, where, and for how long."""
    model = module.model
    parameters = sum(p.numel() for p in model.net.parameters())
    steps, batch = trainer.max_steps, data.batch_size
    return (
        f"{trainer.default_root_dir}: {type(module).__name__}, {type(model.path).__name__}, "
        f"{type(model.net).__name__} of {parameters:,} parameters on {type(data).__name__}; "
        f"{start.images + max(0, steps - start.step) * batch:,} images in {steps:,} steps of {batch}"
        + (f"; starts from the weights in {start.weights}" if start.weights else "")
        + (f"; resumed after {start.step:,} steps, {start.checkpoint}" if start.checkpoint else "")
        + ("; nothing is left to train, --images sets the length" if start.step >= steps else "")
    )


def summary(
    trainer: pl.Trainer,
    module: GenerativeModule,
    start: Start,
    parts: Mapping[str, type[pl.Callback]],
    seconds: float,
    fit_seconds: float,
) -> dict[str, Any]:
    """What other programs want to know of the run: files, progress, the last values, and what took the time.

    Args:
        trainer, module, start: the run.
        parts: the callbacks of the configuration, by their keys.
        seconds: from the start of the program.
        fit_seconds: of them, in training.
    """
    acting = {key: callback(trainer, part) for key, part in parts.items() if issubclass(part, EveryImages)}
    newest = {
        "samples": callback(trainer, SampleGrid).newest,
        "checkpoint": callback(trainer, Checkpoint).newest or start.checkpoint,
    }
    told = {
        "run": trainer.default_root_dir,
        "images_seen": module.images_seen,
        "steps": trainer.global_step,
        "seconds": round(seconds, 1),
        "loss": callback(trainer, TrainingLog).latest.get("loss"),
        **{name: str(path) if path else None for name, path in newest.items()},
        "share_of_time": {key: round(part.seconds / fit_seconds, 4) for key, part in acting.items()},
        **callback(trainer, QualityCurve).latest,
    }
    # JSON has no NaN.
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in told.items()}


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """Without Lightning's advice that does not hold here; other warnings take one line each."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # a report is asked for
    formatwarning = warnings.formatwarning
    with warnings.catch_warnings():
        for advice in (
            ".*args parameter is intended to run from within Python.*",
            ".*does not have many workers.*",  # a batch is one indexing operation
            ".*`tensorboardX` has been removed.*",
            ".*treespec, LeafSpec.*",
            ".*`srun` command is available.*",  # it is on every login node
        ):
            warnings.filterwarnings("ignore", advice)
        warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
        try:
            yield
        finally:
            warnings.formatwarning = formatwarning
