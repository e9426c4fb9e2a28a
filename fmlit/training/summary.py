"""What a run reports: one line when it starts, one of JSON when it ends, and little else."""

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl

from fmlit.data.data_module import DataModule
from fmlit.storage.run_folder import RunFolder
from fmlit.training.averages import EMA
from fmlit.training.callbacks import Checkpoint, Preemption, QualityCurve, SampleGrid
from fmlit.training.devices import describe_devices
from fmlit.training.hooks import EveryImages
from fmlit.training.modules import GenerativeModule
from fmlit.training.resume import Start


class Parts(NamedTuple):
    """The callbacks of every run under their keys in a recipe, in the order in which they act."""

    ema: EMA
    checkpoint: Checkpoint  # before what takes long and may fail
    samples: SampleGrid
    quality: QualityCurve
    preemption: Preemption  # after all that acts at the end of a step


def describe_run(
    folder: RunFolder, trainer: pl.Trainer, module: GenerativeModule, data: DataModule, start: Start
) -> str:
    """What is going to be trained, where, and for how long, in one line."""
    model = module.model
    parameters = sum(p.numel() for p in model.net.parameters())
    steps, batch = trainer.max_steps, data.batch_size
    return (
        f"{folder}: {type(module).__name__}, {type(model.path).__name__}, "
        f"{type(model.net).__name__} of {parameters:,} parameters on {data.title}; "
        f"{start.images + max(0, steps - start.step) * batch:,} images in {steps:,} steps of {batch}"
        + (f"; starts from the weights in {start.weights}" if start.weights else "")
        + (f"; resumed after {start.step:,} steps, {start.checkpoint}" if start.checkpoint else "")
        + f"; {describe_devices(trainer)}"
        + ("; nothing is left to train, --images sets the length" if start.step >= steps else "")
    )


def summarize_run(
    folder: RunFolder, module: GenerativeModule, start: Start, parts: Parts, seconds: float, fit_seconds: float
) -> dict[str, Any]:
    """What other programs want to know of the run: files, progress, the last values, and what took the time.

    Args:
        folder: the run folder.
        module: the module at the end of training.
        start: where training started from.
        parts: the callbacks of the configuration.
        seconds: the time since the start of the program.
        fit_seconds: the part of it that training took.
    """
    acting = {key: part for key, part in parts._asdict().items() if isinstance(part, EveryImages)}
    newest = {"samples": parts.samples.newest, "checkpoint": parts.checkpoint.newest or start.checkpoint}
    summary = {
        "run": str(folder),
        "images_seen": module.images_seen,
        "steps": module.global_step,
        "seconds": round(seconds, 1),
        "loss": module.run.latest.get("loss"),
        **{name: str(path) if path else None for name, path in newest.items()},
        "share_of_time": {key: round(part.seconds / fit_seconds, 4) for key, part in acting.items()},
        **parts.quality.latest,
    }
    # JSON has no NaN.
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """Silence advice of Lightning that does not hold here. Other warnings take one line each."""
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
