"""Pictures of samples while training."""

import logging
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.files import atomic_write
from fmlit.core.processes import ProcessGroup
from fmlit.core.randomness import image_seeds
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.drawing import draw_samples
from fmlit.sampling.generate import generate
from fmlit.sampling.samplers import ODESampler, Sampler
from fmlit.training.hooks import EveryImages, check_sampler
from fmlit.training.modules import GenerativeModule
from fmlit.training.pictures import send_picture, warn_of_loggers_without_pictures

log = logging.getLogger(__name__)

MOST_ROWS = 16
POINTS = 4096
BATCHES = 4  # of a grid: how many ranks can share it


class SampleGrid(EveryImages):
    """Draw a grid of samples from the averaged weights, from the same noise every time. Up to four ranks share it.

    The picture is written to the folder ``samples`` of the run, and sent to every logger that takes pictures. A
    class-conditional model shows one class per row. Vectors are plotted instead.

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
            raise UserError(f"columns must be at least 1, got {columns}")
        image_seeds(seed, [])  # fails now, rather than at the first picture, where the seed is none
        self.sampler, self.columns, self.seed = sampler, columns, seed
        self.newest: Path | None = None
        self._warned = False  # of loggers that take no pictures

    def setup(self, trainer: pl.Trainer, pl_module: GenerativeModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.every is not None:
            check_sampler(self.sampler, pl_module, "samples.sampler")

    def was_done(self, trainer: pl.Trainer, module: GenerativeModule) -> bool:
        path = module.run.folder.sample_grid(module.images_seen)
        done = ProcessGroup.current().from_first(path.exists)
        self.newest = path if done else None
        return done

    def act(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        model = module.run.sampled_model()
        classes = model.num_classes
        rows = self.columns if classes is None else min(classes, MOST_ROWS)
        count = rows * self.columns if len(model.shape) == 3 else POINTS
        labels = None if classes is None else (torch.arange(count) // self.columns) % classes
        samples = self._draw(model, count, labels)
        if not trainer.is_global_zero:
            return
        picture = draw_samples(samples, self.columns)
        path = module.run.folder.sample_grid(module.images_seen)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                picture.save(file, "PNG")
            self.newest = path
        except OSError as error:  # the Checkpoint callback decides whether a full disk ends the run
            log.warning("no picture %s (%s)", path, error.strerror or error)
        step = trainer.global_step
        without = [
            logger
            for logger in trainer.loggers
            if not send_picture(logger, "samples", picture, module.images_seen, step)
        ]
        if without and not self._warned:
            warn_of_loggers_without_pictures(without)
            self._warned = True

    def _draw(self, model: GenerativeModel, count: int, labels: Tensor | None) -> Tensor:
        """Samples 0 ... count - 1 in their order, on every rank."""
        ranks, size = ProcessGroup.current(), -(-count // BATCHES)
        with ranks.fail_together():
            shares = generate(model, self.sampler, count, self.seed, size, labels, ranks.rank, ranks.size)
            drawn = [(torch.tensor(indices), samples) for indices, samples in shares]
        nothing = torch.zeros(0, *model.shape, device=model.device)
        order = ranks.gather_rows(torch.cat([torch.zeros(0, dtype=torch.int64), *(indices for indices, _ in drawn)]))
        samples = ranks.gather_rows(torch.cat([nothing, *(samples for _, samples in drawn)]))
        return samples[order.argsort().to(samples.device)]
