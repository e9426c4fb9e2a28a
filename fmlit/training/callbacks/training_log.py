"""The loss in total and per time bin, the learning rate and the pace, in the logs and on the screen."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.training.hooks import Callback
from fmlit.training.lightning_internals import EndlessProgressBar, is_accumulating
from fmlit.training.modules import GenerativeModule

STEPS_KEPT = 100  # losses and times of so many steps wait on the device before they are summed


class TrainingLog(Callback):
    """Log, every ``Trainer.log_every_n_steps`` steps, means over all samples of all ranks since the last time.

    ``loss`` in total and ``loss_t/<from>-<to>`` per bin of t, ``learning_rate``, ``images_seen``, and
    ``images_per_second`` without the time that sampling and scoring took; ``transport_cost`` where noise and data are
    coupled. Sums stay on the device in between: no step waits for the accelerator.

    Args:
        bins: number of equal bins of t.
    """

    def __init__(self, bins: int = 5) -> None:
        if bins < 1:
            raise UserError(f"bins must be at least 1, got {bins}")
        self.bins = bins
        self._sums = torch.zeros(2, bins)  # of losses and counts in each bin
        self._steps: list[tuple[Tensor, Tensor]] = []
        self._costs: dict[str, list[Tensor]] = {}
        self._since = (0.0, 0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self._sums = torch.zeros(2, self.bins, device=pl_module.device)
        self._steps.clear()
        self._costs.clear()
        self._since = (time.perf_counter(), pl_module.images_seen, pl_module.run.pause_seconds)

    def on_train_batch_end(self, trainer: Any, pl_module: GenerativeModule, outputs: Any, *_: Any) -> None:
        self._steps.append((outputs["losses"], outputs["times"]))
        if len(self._steps) == STEPS_KEPT:
            self._sum_up()
        for name in ("transport_cost", "transport_cost_independent"):
            if name in outputs:
                self._costs.setdefault(name, []).append(outputs[name])
        every = trainer.log_every_n_steps  # 0 is Lightning's "never"
        if every and trainer.global_step % every == 0 and not is_accumulating(trainer):
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        if pl_module.images_seen > self._since[1]:
            self._log(trainer, pl_module)

    def _sum_up(self) -> None:
        """Add what the last steps left to the sums, in a few large operations instead of a few in every step."""
        losses, times = (torch.cat(values) for values in zip(*self._steps, strict=True))
        bins = (times * self.bins).long().clamp(max=self.bins - 1)
        self._sums.index_add_(1, bins, torch.stack([losses.float(), torch.ones_like(times, dtype=torch.float32)]))
        self._steps.clear()

    def _log(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        if self._steps:
            self._sum_up()
        sums, counts = trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        self._sums = torch.zeros_like(self._sums)
        now = (time.perf_counter(), module.images_seen, module.run.pause_seconds)
        seconds = now[0] - self._since[0] - (now[2] - self._since[2])
        latest = module.run.latest = {
            "loss": sum(sums) / sum(counts),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "images_per_second": (now[1] - self._since[1]) / max(seconds, 1e-9),
        }
        n = self.bins
        by_time = {f"loss_t/{i / n:.2f}-{(i + 1) / n:.2f}": sums[i] / counts[i] for i in range(n) if counts[i]}
        means = {name: torch.stack(values).mean() for name, values in self._costs.items()}
        costs = {name: trainer.strategy.reduce(mean, reduce_op="mean").item() for name, mean in means.items()}
        self._costs.clear()
        self._since = now
        module.run.log({**latest, **by_time, **costs})
        module.run.guard.check()


class ProgressBar(EndlessProgressBar):
    """Lightning's rich bar with loss, images per second and images seen; a line now and then where there is no screen.

    Args:
        lines: number of lines over a whole run where the output is a file or a pipe.
    """

    def __init__(self, lines: int = 20) -> None:
        super().__init__()
        if lines < 1:
            raise UserError(f"lines must be at least 1, got {lines}")
        self.lines = lines
        self._printed = 0
        self._screen = sys.stdout.isatty()
        if not self._screen:
            self.disable()  # a bar in a file is noise; lines take its place

    def get_metrics(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, Any]:
        latest = pl_module.run.latest
        shown: dict[str, Any] = {"images": f"{pl_module.images_seen:,}"}
        if latest:
            shown |= {"loss": f"{latest['loss']:.4f}", "images/s": f"{latest['images_per_second']:.0f}"}
        return shown

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if not self._screen and trainer.is_global_zero:
            done = trainer.global_step * self.lines // max(1, trainer.max_steps)
            if done > self._printed:
                self._printed = done
                shown = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
                print(f"step {trainer.global_step}/{trainer.max_steps}  {shown}", flush=True)
