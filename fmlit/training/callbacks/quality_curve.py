"""FID and its relatives while training: a cheap curve at fixed seeds, on all ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from fmlit.core.errors import UserError
from fmlit.core.processes import ProcessGroup
from fmlit.core.randomness import image_seeds
from fmlit.data.stores import warn_of_uneven_classes
from fmlit.metrics import Features, ImageQuality, PixelFeatures, Reference, reference_statistics
from fmlit.metrics.image_quality import Metric, check_metrics, quantize
from fmlit.metrics.protocol import metric_key
from fmlit.sampling.generate import generate
from fmlit.sampling.samplers import ODESampler, Sampler
from fmlit.storage.checkpoints import load
from fmlit.training.callbacks.checkpoint import save
from fmlit.training.hooks import EveryImages, check_sampler
from fmlit.training.loggers import read_rows
from fmlit.training.modules import GenerativeModule


class QualityCurve(EveryImages):
    """Score ``n`` samples of the averaged weights against the training images, always from the same seeds.

    All ranks share the sampling; the images do not depend on their number. Values are logged under names that carry n
    and the features (``fid_5k``, ``fd_pixels_1k``), and the protocol string that they belong to is printed
    once, with what they cost: time, and the peak memory of the rank that needs most. The checkpoint with the best first
    metric, in the order below, is kept as ``best.ckpt`` of the run.

    Args:
        every: interval in training images; null for never.
        n: number of samples. Below 2,048 the Inception covariance is rank-deficient; compare curves at equal n only.
        features: in which distances are taken: ``InceptionFeatures`` for FID, ``PixelFeatures`` for sets of
            tiny images.
        metrics: any of fid, kid, precision, recall.
        sampler: how to sample. In a recipe, null means the sampler of the pictures, ``samples.sampler``; in Python it
            means ``ODESampler()``.
        split: the part of the data to compare with.
        batch_size: samples per batch and rank.
        seed: of the samples.
        cache: folder of the reference statistics, which are computed once.
    """

    def __init__(
        self,
        every: int | None = None,
        n: int = 5_000,
        features: Features = PixelFeatures(),
        metrics: Sequence[Metric] = ("fid", "kid"),
        sampler: Sampler | None = None,
        split: Literal["train", "test"] = "train",
        batch_size: int = 250,
        seed: int = 0,
        cache: str = "data/statistics",
    ) -> None:
        super().__init__(every)
        if n < 2 or batch_size < 1:
            raise UserError(f"quality.n must be at least 2 and quality.batch_size at least 1, got {n} and {batch_size}")
        check_metrics(metrics, n)
        image_seeds(seed, [])  # fails now, rather than at the first score, where the seed is none
        self.n, self.features, self.metrics = n, features, tuple(metrics)
        self.sampler = sampler or ODESampler()
        self.split, self.batch_size, self.seed, self.cache = split, batch_size, seed, cache
        self.latest: dict[str, float] = {}
        self.best: float | None = None
        self._best_of: str | None = None  # the metric
        self._best_at: int | None = None  # images seen by the best.ckpt that an earlier launch left
        self._reference: Reference | None = None

    def setup(self, trainer: pl.Trainer, pl_module: GenerativeModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.latest, self.best, self._best_of, self._best_at = {}, None, None, None
        if self.every is not None:
            check_sampler(self.sampler, pl_module, "quality.sampler")
            if len(pl_module.model.shape) != 3:
                raise UserError("quality.every: these distances need images, and the data are vectors; leave it null")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        if self.every is None:
            return
        self._recall_best(pl_module.run.folder.best, trainer)
        data = pl_module.run.data
        if data is None:
            raise UserError("quality.every: scores need one of fmlit's data modules, such as CIFAR10; leave it null")
        if pl_module.model.num_classes is not None:
            warn_of_uneven_classes(data.dataset(self.split))
        self.features.to(pl_module.device)
        source = data.dataset(self.split), data.fingerprint(self.split), self.features, self.split, self.cache
        self._reference = reference_statistics(*source, batch_size=self.batch_size)

    def was_done(self, trainer: pl.Trainer, module: GenerativeModule) -> bool:
        """Where the save of best.ckpt was cut short, its score is measured again."""
        names = tuple(metric_key(metric, self.features.name, self.n).rpartition("_")[0] for metric in self.metrics)

        def read() -> dict[str, float]:
            rows = read_rows(module.run.folder.metrics)
            here = next((row for row in rows if row.get("step") == str(trainer.global_step)), {})
            return {name: float(here[name]) for name in here if here[name] and name.rpartition("_")[0] in names}

        self.latest = ProcessGroup.current().from_first(read)
        return self._best_at == module.images_seen or (bool(self.latest) and not self._is_better(*self._first()))

    def _first(self) -> tuple[float, str]:
        """The latest value of the metric that decides which checkpoint is the best."""
        name, value = next(iter(self.latest.items()))
        return value, name

    def act(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        assert self._reference is not None
        model = module.run.sampled_model()
        ranks = ProcessGroup.current()
        size = min(self.batch_size, self.n)  # the last batch is padded
        with torch.autocast(module.device.type, enabled=False), ranks.fail_together():
            quality = ImageQuality(self.features, self._reference, self.metrics)
            for _, samples in generate(model, self.sampler, self.n, self.seed, size, None, ranks.rank, ranks.size):
                quality.update(quantize(samples))
        self.latest = ranks.from_first(quality.reduce().compute)
        module.run.log(self.latest)
        cost = quality.cost()
        first, name = self._first()
        if self.best is None and trainer.is_global_zero:
            print(f"{name} is {quality.protocol(module.run.sampled_weights, self.sampler.name)}; {cost}", flush=True)
        if self._is_better(first, name):
            before, self.best, self._best_of = (self.best, self._best_of), first, name
            checkpoints = module.run.checkpoints
            if not save(trainer, module.run.folder.best, checkpoints.on_error if checkpoints else "abort"):
                self.best, self._best_of = before

    def _is_better(self, value: float, name: str) -> bool:
        if self.best is None or self._best_of != name:  # that was another metric, or of another count
            return True
        return value > self.best if name.startswith(("precision", "recall")) else value < self.best

    def _recall_best(self, path: Path, trainer: pl.Trainer) -> None:
        """The score of best.ckpt, where a run goes on: the last checkpoint is from before the scores of its step."""

        def read() -> dict[str, Any] | None:
            if not trainer.ckpt_path or not path.exists():
                return None
            try:
                checkpoint = load(path)
                return {**checkpoint["callbacks"][self.state_key], "at": checkpoint["images_seen"]}
            except (KeyError, OSError, TypeError, ValueError):  # damaged, or another program's
                return None

        stored = ProcessGroup.current().from_first(read)
        if stored and self._is_better(stored["best"], stored["of"]):
            self.best, self._best_of, self._best_at = stored["best"], stored["of"], stored["at"]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "best": self.best, "of": self._best_of}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.best, self._best_of = state_dict["best"], state_dict["of"]
