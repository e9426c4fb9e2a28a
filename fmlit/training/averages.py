"""Exponential moving averages of the weights, kept beside the trained ones and never swapped with them."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fmlit.core.errors import UserError
from fmlit.core.internals import copy_all, has_buffers, lerp_all
from fmlit.models.generative_model import GenerativeModel
from fmlit.training.hooks import Callback
from fmlit.training.modules import GenerativeModule


class EMA(Callback):
    """Keep averaged copies of the network, in float32, and update them after every optimizer step.

    The decay over a step of ``b`` images is ``0.5 ** (b / h)`` with ``h = min(half_life, ramp * images_seen)``. Early
    on the average forgets quickly, so that it does not carry the initial weights along (the ramp is that of
    `Karras et al. 2022 <https://arxiv.org/abs/2206.00364>`_). A half-life in images means the same for every batch size
    and number of ranks.

    Buffers, such as running statistics, are copied as they are, wherever both networks have them in one shape.

    The trained weights are never touched: samplers get ``model()``. Every checkpoint holds all copies, under
    ``checkpoint["ema"][name]``.

    Args:
        half_lives: half-lives in images, one copy each; the first is the one that is sampled from.
        ramp: largest half-life as a share of the images seen so far.
    """

    def __init__(self, half_lives: Sequence[int] = (500_000,), ramp: float = 0.05) -> None:
        if not half_lives or min(half_lives) < 1 or len(set(half_lives)) < len(half_lives):
            raise UserError(f"ema.half_lives must be distinct positive numbers of images, got {list(half_lives)}")
        if not ramp > 0:
            raise UserError(f"ema.ramp must be positive, got {ramp}")
        self.half_lives, self.ramp = tuple(half_lives), ramp
        self.names = tuple(f"ema_{half_life}" for half_life in self.half_lives)
        self.copies: dict[str, nn.Module] = {}
        self._parameters: dict[str, list[Tensor]] = {}  # of the trained network ("") and of each copy
        self._started = False  # the first update copies the weights instead of averaging
        self._buffered, self._float = False, True  # whether the network has buffers, and is all in float32
        self._images_seen = self._step = 0

    def setup(self, trainer: pl.Trainer, pl_module: GenerativeModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            pl_module.run.averages, net = self, pl_module.model.net
            self.copies = self.copies or {
                name: deepcopy(net).float().requires_grad_(False).eval() for name in self.names
            }

    def on_fit_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        for net in self.copies.values():
            pl_module.execution.compile_net(net.to(pl_module.device))
        self._parameters = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self._images_seen, self._step = pl_module.images_seen, trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        self.update(pl_module, trainer.global_step)

    @torch.no_grad()
    def update(self, module: GenerativeModule, step: int) -> None:
        """Include the weights after optimizer step number ``step``, unless that has been done.

        Whatever samples or saves calls this first, so callbacks may be listed in any order.
        """
        if step == self._step:
            return  # the weights have not moved, as where gradients are still accumulating
        self._step, seen = step, module.images_seen
        images, self._images_seen = seen - self._images_seen, seen
        if not self._parameters:  # listing them takes eight times as long as averaging those of a small network
            nets: dict[str, nn.Module] = {"": module.model.net, **self.copies}
            self._parameters = {name: [*net.parameters()] for name, net in nets.items()}
            self._buffered = has_buffers(module.model.net)
            self._float = all(p.dtype == torch.float32 for p in self._parameters[""])
        trained = self._parameters[""] if self._float else [p.float() for p in self._parameters[""]]
        for half_life, (name, average) in zip(self.half_lives, self.copies.items(), strict=True):
            if self._started:
                decay = 0.5 ** (images / min(half_life, self.ramp * seen))
                lerp_all(self._parameters[name], trained, 1 - decay)
            else:
                copy_all(self._parameters[name], trained)
            if self._buffered:
                _copy_buffers(module.model.net, average)
        self._started = True

    def model(self, module: GenerativeModule, name: str | None = None) -> GenerativeModel:
        """The module's ``GenerativeModel`` around an averaged copy (the first, or the one of that name)."""
        return module.model.with_net(self.copies[name or self.names[0]])

    def averaged_weights(self) -> dict[str, dict[str, Tensor]]:
        """For each copy, the state dict of the network."""
        return {name: net.state_dict() for name, net in self.copies.items()}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        stored = checkpoint.get("ema", {})
        if missing := [name for name in self.names if name not in stored]:
            raise UserError(f"the checkpoint has no average {missing[0]}, only {sorted(stored)}: keep ema.half_lives")
        for name, net in self.copies.items():
            net.load_state_dict(stored[name])
        self._started = True


def _copy_buffers(net: nn.Module, average: nn.Module) -> None:
    """Copy by name. A network may make, replace or resize buffers as it runs. Each network keeps caches of its own."""
    ours = dict(average.named_buffers())
    for name, theirs in net.named_buffers():
        if name in ours and ours[name].shape == theirs.shape:
            ours[name].copy_(theirs)
