"""Pictures of samples while training."""

from pathlib import Path

import lightning.pytorch as pl
import torch

from fmlit.callbacks.intervals import EveryImages, check_sampler, sampled_model
from fmlit.modules import GenerativeModule
from fmlit.pictures import draw_samples
from fmlit.randomness import image_seeds
from fmlit.samplers import ODESampler, Sampler

MOST_ROWS = 16
POINTS = 4096


class SampleGrid(EveryImages):
    """Draws a grid of samples from the averaged weights, from the same noise every time, on rank 0.

    Written to ``<run>/samples/<images seen>.png`` and sent to every logger that takes pictures. A class-conditional
    model shows one class per row. Data that are vectors are plotted instead.

    Args:
        every: interval in training images; null for never.
        sampler: how to sample.
        columns: pictures per row; unconditional grids are square.
        seed: of the noise.
    """

    def __init__(
        self, every: int | None = 500_000, sampler: Sampler = ODESampler(), columns: int = 10, seed: int = 0
    ) -> None:
        super().__init__(every)
        if columns < 1:
            raise ValueError(f"columns must be at least 1, got {columns}")
        self.sampler, self.columns, self.seed = sampler, columns, seed
        self.newest: Path | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        assert isinstance(pl_module, GenerativeModule)
        if self.every is not None:
            check_sampler(self.sampler, pl_module, "samples.sampler")

    def act(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        if not trainer.is_global_zero:
            return
        model = sampled_model(trainer, module)
        classes = model.num_classes
        rows = self.columns if classes is None else min(classes, MOST_ROWS)
        count = rows * self.columns if len(model.shape) == 3 else POINTS
        indices = torch.arange(count)
        labels = None if classes is None else (indices // self.columns) % classes
        samples = self.sampler.sample(model, image_seeds(self.seed, indices), labels)
        picture = draw_samples(samples, self.columns)
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        self.newest = folder / f"{module.images_seen:09d}.png"
        picture.save(self.newest)
        for logger in trainer.loggers:
            if hasattr(logger, "log_picture"):
                logger.log_picture("samples", picture, module.images_seen, trainer.global_step)
            elif hasattr(logger, "log_image"):
                logger.log_image("samples", [picture], step=trainer.global_step)
