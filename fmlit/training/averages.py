"""Exponential moving averages of the weights, kept beside the trained ones and never swapped with them."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

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
        self.copies: dict[str, AveragedModel] = {}
        self._parameters: dict[str, list[Tensor]] = {}  # of the trained network ("") and of each copy
        self._buffered = False  # whether there are buffers
        self._float = True  # whether these are in float32
        self._images_seen = self._step = 0

    def setup(self, trainer: pl.Trainer, pl_module: GenerativeModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        pl_module.run.averages = self
        self.copies = self.copies or {name: self._new_copy(pl_module.model.net) for name in self.names}

    def _new_copy(self, net: nn.Module) -> AveragedModel:
        copy = AveragedModel(net, use_buffers=False).float()
        copy.requires_grad_(False)
        return copy.eval()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        for copy in self.copies.values():
            copy.module.to(pl_module.device)  # the count stays on the CPU, where reading it stalls no queue
            pl_module.execution.compile_net(copy.module)
        self._parameters = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self._images_seen, self._step = pl_module.images_seen, trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: GenerativeModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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
            self._buffered = has_buffers(nets[""])
            self._float = all(p.dtype == torch.float32 for p in self._parameters[""])
        trained = self._parameters[""]
        if not self._float:
            trained = [p.float() for p in trained]
        for half_life, (name, copy) in zip(self.half_lives, self.copies.items(), strict=True):
            if copy.n_averaged == 0:
                copy_all(self._parameters[name], trained)
            else:
                decay = 0.5 ** (images / min(half_life, self.ramp * seen))
                lerp_all(self._parameters[name], trained, 1 - decay)
            copy.n_averaged += 1
            if self._buffered:
                _copy_buffers(module.model.net, copy.module)

    def model(self, module: GenerativeModule, name: str | None = None) -> GenerativeModel:
        """The module's ``GenerativeModel`` around an averaged copy (the first, or the one of that name)."""
        return module.model.with_net(self.copies[name or self.names[0]].module)

    def averaged_weights(self) -> dict[str, dict[str, Tensor]]:
        """For each copy, the state dict of the network."""
        return {name: copy.module.state_dict() for name, copy in self.copies.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: GenerativeModule, checkpoint: Mapping[str, Any]
    ) -> None:
        stored = checkpoint.get("ema", {})
        missing = [name for name in self.names if name not in stored]
        if missing:
            raise UserError(f"the checkpoint has no average {missing[0]}, only {sorted(stored)}: keep ema.half_lives")
        for name, copy in self.copies.items():
            copy.module.load_state_dict(stored[name])
            copy.n_averaged.fill_(1)  # the first update copies the weights instead of averaging


def _copy_buffers(net: nn.Module, copy: nn.Module) -> None:
    """By name: buffers may be made, replaced or resized by a network as it runs; caches of its own are left to it."""
    ours = dict(copy.named_buffers())
    for name, theirs in net.named_buffers():
        if name in ours and ours[name].shape == theirs.shape:
            ours[name].copy_(theirs)
