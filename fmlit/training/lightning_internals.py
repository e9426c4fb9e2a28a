"""Every private name of Lightning and jsonargparse that fmlit touches, each with the reason.

All were seen in Lightning 2.6 and jsonargparse 4.53. ``fmlit.core.internals`` is the same for the floors below. A test
fails where another module touches such a name.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace, _typehints
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """The trainer of a module, or None, where the public ``module.trainer`` raises an error.

    Delete once Lightning offers a way to ask.
    """
    return module._trainer


exit_at_once = os._exit  # public, in spite of its name: ends the process from any thread, without cleaning up


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether the gradient is still being summed: no optimizer step has followed the last batch.

    Delete once the trainer or the hook ``on_train_batch_end`` says so.
    """
    return trainer.fit_loop._should_accumulate()


def restart_accumulation(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Let a run that is resumed with another ``accumulate_grad_batches`` start with a whole optimizer step.

    Lightning counts batches, and a step is due where their number is a multiple of ``accumulate_grad_batches``. Every
    checkpoint follows a step, so the number becomes that of the steps times the batches of a step. Delete once
    Lightning restores the number of steps and not of batches.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    missing = checkpoint["global_step"] * accumulate - progress["current"]["ready"]
    for counts in (progress["current"], progress["total"]):
        counts.update({name: count + missing for name, count in counts.items()})


def skip_signal_broadcast(trainer: Any) -> None:
    """Stop Lightning from broadcasting a flag in every step, with a wait for the device.

    The flag tells other ranks of a SIGTERM. fmlit handles signals itself, so the flag is never set. Delete once
    Lightning broadcasts only where its own signal handler is in place.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def trains_in_copies(trainer: pl.Trainer) -> bool:
    """Whether the strategy trains in copies of this process (ddp_spawn, ddp_fork, ddp_notebook).

    Delete once strategies say how they launch.
    """
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


class EndlessProgressBar(RichProgressBar):
    """Lightning's bar, which says "training" and counts no epochs, as the stream of batches has no end.

    Delete once the description is an argument.
    """

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


class RelocatableWandbLogger(WandbLogger):
    """Lightning's W&B logger, whose folder is known only after it was built, and whose run a subclass starts.

    Delete once Lightning starts the W&B run in a method of its own that a subclass can replace.
    """

    def attach(self, folder: str | os.PathLike[str]) -> None:
        """Record in this folder, as the W&B run whose id is kept there."""
        self._save_dir, self._name = str(folder), Path(folder).name

    @property
    def init_arguments(self) -> dict[str, Any]:
        """What ``wandb.init`` gets."""
        return self._wandb_init

    @property
    def started_run(self) -> Any:
        """The W&B run, or None before it has started."""
        return self._experiment

    @started_run.setter
    def started_run(self, run: Any) -> None:
        self._experiment = run


_discard_misfits = _typehints.discard_init_args_on_class_path_change


def forget_defaults_of_replaced_classes() -> None:
    """When an option replaces a class by another, carry over only what the user has set.

    jsonargparse carries over all values that fit (its issue 460). An SDESampler would get the 18 steps that are the
    default of ODESampler, which stood there before, in place of its own 250. Calling this again changes nothing. Delete
    once jsonargparse tells defaults from given values.
    """

    def discard(parser: Any, before: Any, now: Mapping[str, Any]) -> None:
        if before and "init_args" in before and before["class_path"] != now["class_path"]:
            defaults = _typehints.ActionTypeHint.get_class_parser(before["class_path"], {}).get_defaults()
            values = before["init_args"]
            for name in [name for name in vars(values) if name in defaults and values[name] == defaults[name]]:
                del values[name]
        _discard_misfits(parser, before, now)

    _typehints.discard_init_args_on_class_path_change = discard


_adapt_class = _typehints.adapt_class_type


def pass_null_to_nested_options() -> None:
    """Let ``--model.execution.compile null`` mean None.

    jsonargparse 4.53 hands the text "None" to the parser of the inner class. Calling this again changes nothing. Delete
    once jsonargparse hands on null.
    """

    def adapt(value: Any, *args: Any, **kwargs: Any) -> Any:
        inner = value.get("init_args") if isinstance(value, Namespace) else None
        if isinstance(inner, _typehints.NestedArg) and inner.val is None:
            value["init_args"] = inner._replace(val="null")
        return _adapt_class(value, *args, **kwargs)

    _typehints.adapt_class_type = adapt
