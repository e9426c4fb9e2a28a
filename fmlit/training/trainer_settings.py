"""Trainer settings beyond the user's own: what fits the launch, what is faster, and what is refused."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from fmlit.core.errors import UserError
from fmlit.training.lightning_internals import trains_in_copies

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a rank that has not answered by then is lost; Lightning waits for 30


def match_launcher(given: Mapping[str, Any]) -> dict[str, int]:
    """``devices`` and ``num_nodes`` that match the processes of torchrun or srun, unless the user has given them.

    Lightning takes all GPUs of one node, or one CPU, and stops where that is something else. Under an elastic torchrun
    the numbers change from one attempt to the next.
    """
    if given["devices"] != "auto" or given["num_nodes"] != 1:
        return {}
    if os.environ.keys() >= {"WORLD_SIZE", "LOCAL_WORLD_SIZE"}:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return {"devices": local, "num_nodes": int(os.environ["WORLD_SIZE"]) // local}
    if SLURMEnvironment.detect() and (tasks := int(os.environ["SLURM_NTASKS"])) > 1:
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return {"devices": tasks // nodes, "num_nodes": nodes}
    return {}


def check_launch(world_size: int) -> None:
    """Raise a UserError if torchrun or srun started more processes than train together.

    Lightning would let each train alone, all in the same folder.
    """
    started = 1
    if os.environ.keys() >= {"RANK", "WORLD_SIZE"}:
        started = int(os.environ["WORLD_SIZE"])
    elif SLURMEnvironment.detect():
        started = int(os.environ["SLURM_NTASKS"])
    if started not in (1, world_size):
        problem = f"{started} processes were started, but {world_size} would train together"
        remedy = "set it to the processes of a node, trainer.num_nodes to the number of nodes, trainer.strategy to ddp"
        raise UserError(f"trainer.devices: {problem}; {remedy}")


def cluster_plugins(given: Sequence[Any]) -> list[ClusterEnvironment]:
    """Slurm's environment where Lightning would choose it, without its own requeueing inside a signal handler.

    Args:
        given: the user's plugins, of which a cluster environment goes first.
    """
    chosen = any(isinstance(plugin, ClusterEnvironment) for plugin in given) or TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() and not chosen else []


@contextmanager
def static_graph_ddp() -> Iterator[None]:
    """Let a Trainer that is built in the block train faster where it chooses ``ddp``, or is asked to.

    Every step runs the same network. So its graph is static, and gradients need no copy of their own.
    """
    registered = StrategyRegistry["ddp"]
    settings: dict[str, Any] = {"static_graph": True, "gradient_as_bucket_view": True, "timeout": COLLECTIVE_TIMEOUT}
    StrategyRegistry.register("ddp", DDPStrategy, override=True, **registered["init_params"], **settings)
    try:
        yield
    finally:
        StrategyRegistry["ddp"] = registered


def default_precision(accelerator: Any) -> str:
    """bf16-mixed on GPUs that compute in bfloat16 (float32 weights, optimizer and averages), float32 elsewhere."""
    gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def check_launcher(trainer: pl.Trainer) -> None:
    """Raise a UserError for a strategy that trains in copies of this process, which would never hear of the run."""
    if trains_in_copies(trainer):
        raise UserError("strategy ddp_spawn, ddp_fork and ddp_notebook train in copies of this process: use ddp")


# Callbacks of Lightning that would change what a recipe says behind its back, or do again what fmlit does.
REPLACED_CALLBACKS = {
    "GradientAccumulationScheduler": "set trainer.accumulate_grad_batches, which stays the same throughout a run",
    "BatchSizeFinder": "set data.batch_size",
    "LearningRateFinder": "set model.optimizer.learning_rate",
    "WeightAveraging": "fmlit averages the weights itself, see ema",
    "StochasticWeightAveraging": "fmlit averages the weights itself, see ema",
    "Checkpoint": "fmlit saves checkpoints itself, see checkpoint",  # ModelCheckpoint and others
    "Timer": "set trainer.max_time",
}


def check_callbacks(callbacks: Sequence[pl.Callback]) -> None:
    """Raise a UserError for callbacks of Lightning that do not go together with fmlit's own, or their subclasses."""
    for callback in callbacks:
        for cls in type(callback).__mro__:
            if cls.__module__.startswith("lightning.") and (instead := REPLACED_CALLBACKS.get(cls.__name__)):
                raise UserError(f"trainer.callbacks: {type(callback).__name__} cannot be used here; {instead}")


def check_trainer(given: Mapping[str, Any]) -> None:
    """Raise a UserError for settings of a Trainer that no run can have."""
    if given["max_steps"] < 1 and given["max_steps"] != -1:
        raise UserError(f"trainer.max_steps: at least 1, or -1 for all images, got {given['max_steps']}")
    if given["accumulate_grad_batches"] < 1:
        raise UserError(f"trainer.accumulate_grad_batches: at least 1, got {given['accumulate_grad_batches']}")
    if (given["gradient_clip_val"] or 0) < 0:  # which would turn gradients round
        raise UserError(f"trainer.gradient_clip_val: not negative, got {given['gradient_clip_val']}")
    if given["precision"] in ("16-true", "bf16-true"):  # a step is often less than a weight's last digit
        raise UserError(f"trainer.precision: {given['precision']} keeps the weights in half precision: use bf16-mixed")
