"""Exponential moving averages of the weights, kept beside the trained ones and never swapped with them."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fmlit.core.errors import UserError
from fmlit.models.generative_model import GenerativeModel
from fmlit.training.modules import GenerativeModule


class EMA(pl.Callback):
    """Keeps averaged copies of the network, in float32, updated after every optimiser step.

    The decay over a step of ``b`` images is ``0.5 ** (b / h)`` with ``h = min(half_life, ramp * images_seen)``: early
    on the average forgets quickly, so that it does not carry the initial weights along (the ramp is that of Karras et
    al. 2022). In images, it means the same for every batch size and number of ranks.

    Buffers, such as running statistics, are copied as they are, wherever both networks have them in one shape.

    The trained weights are never touched: samplers are handed ``model()``. Every checkpoint carries all copies, under
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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, GenerativeModule)
        if stage == "fit" and not self.copies:
            self.copies = {name: self._new_copy(pl_module.model.net) for name in self.names}

    def _new_copy(self, net: nn.Module) -> AveragedModel:
        copy = AveragedModel(net, use_buffers=False).float()
        copy.requires_grad_(False)
        return copy.eval()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GenerativeModule)
        for copy in self.copies.values():
            copy.module.to(pl_module.device)  # the count stays on the CPU, where reading it stalls no queue
            pl_module.execution.compile_net(copy.module)
        self._parameters = {}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, GenerativeModule)
        if trainer.global_step == self._step:
            return  # gradients are still accumulating: the weights have not moved
        self._step = trainer.global_step
        seen = pl_module.images_seen
        step, self._images_seen = seen - self._images_seen, seen
        if not self._parameters:  # listing them takes eight times as long as averaging those of a small network
            nets: dict[str, nn.Module] = {"": pl_module.model.net, **self.copies}
            self._parameters = {name: [*net.parameters()] for name, net in nets.items()}
            self._buffered = any(module._buffers for module in nets[""].modules())  # also those that are still None
            self._float = all(p.dtype == torch.float32 for p in self._parameters[""])
        trained = self._parameters[""]
        if not self._float:
            trained = [p.float() for p in trained]
        for half_life, (name, copy) in zip(self.half_lives, self.copies.items(), strict=True):
            if copy.n_averaged == 0:
                torch._foreach_copy_(self._parameters[name], trained)
            else:
                decay = 0.5 ** (step / min(half_life, self.ramp * seen))
                torch._foreach_lerp_(self._parameters[name], trained, 1 - decay)
            copy.n_averaged += 1
            if self._buffered:
                _copy_buffers(pl_module.model.net, copy.module)

    def model(self, module: GenerativeModule, name: str | None = None) -> GenerativeModel:
        """The module's ``GenerativeModel`` around an averaged copy (the first, or the one of that name)."""
        return module.model.with_net(self.copies[name or self.names[0]].module)

    def averaged_weights(self) -> dict[str, dict[str, Tensor]]:
        """For each copy, the state dict of the network."""
        return {name: copy.module.state_dict() for name, copy in self.copies.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]
    ) -> None:
        stored = checkpoint.get("ema", {})
        missing = [name for name in self.names if name not in stored]
        if missing:
            raise UserError(f"the checkpoint has no average {missing[0]}, only {sorted(stored)}: keep ema.half_lives")
        for name, copy in self.copies.items():
            copy.module.load_state_dict(stored[name])
            copy.n_averaged.fill_(1)  # the first update copies the weights instead of averaging
        self._images_seen, self._step = checkpoint["images_seen"], checkpoint["global_step"]


def _copy_buffers(net: nn.Module, copy: nn.Module) -> None:
    """By name: buffers may be made, replaced or resized by a network as it runs; caches of its own are left to it."""
    ours = dict(copy.named_buffers())
    for name, theirs in net.named_buffers():
        if name in ours and ours[name].shape == theirs.shape:
            ours[name].copy_(theirs)
