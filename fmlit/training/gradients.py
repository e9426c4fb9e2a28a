"""Gradients on their way to the optimizer: clipped, and kept away from the weights where they are not finite."""

import math

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from fmlit.core.errors import UserError
from fmlit.core.internals import are_finite
from fmlit.core.processes import ProcessGroup

REMEDIES = "lower model.optimizer.learning_rate, set trainer.gradient_clip_val, or look at the data"


class GradientGuard:
    """Notes on the device, where no step waits, whether losses and gradients are finite; ``check`` reads the notes.

    DDP's gradients are sums over ranks: one that is not finite is so on all of them, and all of them leave it out.
    """

    def __init__(self) -> None:
        self._losses = torch.tensor(0.0)  # their sum, which once it is not finite never is again
        self._bad_since = torch.tensor(-1)  # images seen when a gradient was not finite
        self.scaled = False  # gradients are scaled, and never seen by ``admit``: losses alone tell
        self._noted, self._bad_checks = 0, 0  # since the last check; checks in a row that saw a loss not finite

    def to(self, device: torch.device) -> None:
        """Move the notes."""
        self._losses, self._bad_since = self._losses.to(device), self._bad_since.to(device)

    def note(self, losses: Tensor) -> None:
        """Take note of this rank's losses (B,)."""
        self._losses += losses.sum()
        self._noted += 1

    def admit(self, optimizer: Optimizer, images_seen: int, clip_val: float | None, algorithm: str | None) -> None:
        """Clip the gradients by their norm (or, with algorithm "value", each value), and stop what is not finite.

        On an accelerator a fused optimizer skips the step there. Elsewhere ``check`` is called at once.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [gradient for p in parameters if (gradient := p.grad) is not None]
        if clip_val and algorithm != "value":
            norm = get_total_norm(gradients)
            clip_grads_with_norm_(parameters, clip_val, norm)
            finite = torch.isfinite(norm)
        else:
            finite = are_finite(gradients, self._bad_since.device)
            if clip_val:
                clip_grad_value_(parameters, clip_val)
        if finite.device.type == "cpu" and finite:
            return
        self._bad_since = torch.where(finite | (self._bad_since >= 0), self._bad_since, images_seen)
        if finite.device.type != "cpu" and optimizer.param_groups[0].get("fused"):
            # What a gradient scaler would set. From then on, so that the weights stay as they were before.
            optimizer.found_inf = (self._bad_since >= 0).float()  # type: ignore[attr-defined]
        else:
            self.check()

    def check(self) -> None:
        """Wait for the device; all ranks call it.

        Raises:
            UserError: a gradient was not finite, and the weights are those before; or a loss, if scaled.
        """
        if self.scaled:
            self._check_losses()
        if self._bad_since.item() < 0:
            return
        ranks = self._ranks_with_bad_losses()
        where = f", where the loss was not finite on rank {ranks}" if ranks else ""
        after = f"after {self._bad_since.item():,} images{where}"
        raise UserError(f"the gradient is not finite {after}; weights and checkpoints are as before it: {REMEDIES}")

    def _check_losses(self) -> None:
        """Twice in a row, since a scaler may yet find its scale where one loss overflows."""
        if not self._noted:
            return
        ranks = self._ranks_with_bad_losses()
        self._noted, self._bad_checks = 0, self._bad_checks + 1 if ranks else 0
        self._losses.zero_()
        if self._bad_checks > 1:
            precision = "use trainer.precision bf16-mixed or 32-true"
            raise UserError(f"the loss is not finite on rank {ranks}: {precision}, {REMEDIES}")

    def _ranks_with_bad_losses(self) -> str:
        """The ranks that saw a loss that was not finite, as in "0, 3"."""
        totals = ProcessGroup.current().gather_objects(self._losses.item())
        return ", ".join(str(rank) for rank, total in enumerate(totals) if not math.isfinite(total))
