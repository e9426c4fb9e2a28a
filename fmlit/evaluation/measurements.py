"""What an evaluation measures: samples of a model, its likelihood, or anybody's images."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.files import new_folder
from fmlit.core.progress import progress
from fmlit.core.randomness import image_seeds
from fmlit.core.tensors import to_uint8
from fmlit.data.image_files import read_images, save_pngs
from fmlit.data.stores import warn_of_uneven_classes
from fmlit.evaluation.results import Measurement, Record
from fmlit.evaluation.scoring import Scorer, beside_neighbors, bits_per_dimension, nearest_in
from fmlit.metrics.features import weights_digest
from fmlit.metrics.image_quality import quantize
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.drawing import image_grid
from fmlit.sampling.generate import balanced_labels, generate
from fmlit.sampling.samplers import Sampler, SDESampler
from fmlit.storage.descriptions import describe

NEIGHBORS = 7  # training images beside each sample


class ImageMeasurement(Measurement):
    """The scores of the images in a folder or an ``.npz``, whoever made them.

    Raises:
        UserError: the images do not have the shape of the data, see ``read_images``.
    """

    def __init__(self, scorer: Scorer, path: str) -> None:
        self.scorer, self.images = scorer, read_images(path, scorer.data.shape)
        fingerprint = self.images.fingerprint()
        self.identity = {"name": path, "n": len(self.images), "of": fingerprint, **scorer.identity}

    def measure(self) -> Record:
        return self.scorer.score(self._share())

    def _share(self) -> Iterator[tuple[Tensor, None]]:
        """The batches of this rank."""
        ranks, size = self.scorer.ranks, self.scorer.batch_size
        for start in range(ranks.rank * size, len(self.images), ranks.size * size):
            yield self.images.batch(range(start, min(start + size, len(self.images))))[0], None


class ScoredModel:
    """A model, and what all measurements of it have in common.

    Args:
        model: whose samples or likelihood are measured.
        weights: which weights of its checkpoint the model has; part of the protocol.
        scorer: of the model's training data. Samples come in batches of the scorer's size.
        n: number of samples, and the largest number of test images whose likelihood is measured.
        seed: of the samples, and of the choice of test images.
        guide: a weaker model for autoguidance.

    Raises:
        UserError: n is below 2, or the model makes other images than the data hold.
    """

    def __init__(
        self,
        model: GenerativeModel,
        weights: str,
        scorer: Scorer,
        n: int,
        seed: int,
        guide: GenerativeModel | None = None,
    ) -> None:
        if n < 2:
            raise UserError(f"n must be at least 2, got {n}")
        if model.shape != tuple(scorer.data.shape):
            raise UserError(
                f"the model makes images of shape {model.shape}, and {type(scorer.data).__name__} holds "
                f"{tuple(scorer.data.shape)}"
            )
        if "class" in scorer.metrics and model.num_classes != scorer.data.num_classes:
            raise UserError(
                f"metric class needs a model of the data's {scorer.data.num_classes} classes, and this one has "
                f"{model.num_classes or 'none'}"
            )
        if model.num_classes is not None and scorer.distances:
            warn_of_uneven_classes(scorer.data.dataset(scorer.splits[0]))
        self.model, self.weights, self.scorer = model, weights, scorer
        self.n, self.seed, self.guide = n, seed, guide

    @cached_property
    def identity(self) -> Record:
        """What all scores of the model depend on besides the data."""
        settings = {"n": self.n, "seed": self.seed, "batch_size": self.scorer.batch_size}
        return {"weights": self.weights, "of": _digest(self.model), **settings}

    @cached_property
    def guide_identity(self) -> Record:
        """The same of the guide; empty without one."""
        return {} if self.guide is None else {"guide": _digest(self.guide)}


class SampleMeasurement(Measurement):
    """The scores of a model's samples by one sampler.

    Args:
        scored: the model.
        sampler: draws the samples.
        folder: gets the picture of the samples beside their nearest neighbors.
        neighbors: number of samples in that picture; 0 draws none.
        save_images: a folder of PNGs of all samples is created inside this one; None saves none.

    Raises:
        UserError: the sampler does not fit the model.
    """

    def __init__(
        self, scored: ScoredModel, sampler: Sampler, folder: Path, neighbors: int = 0, save_images: Path | None = None
    ) -> None:
        sampler.check(scored.model, scored.guide)
        self.scored, self.sampler, self.neighbors = scored, sampler, neighbors
        self.name = sampler.named(guided=scored.guide is not None)
        label = f"{self.name}-{scored.weights}-{scored.n}-seed{scored.seed}"
        self.picture = folder / f"neighbors-{label}.png" if neighbors else None
        self.pngs = save_images / label if save_images else None
        self.files = tuple(path for path in (self.picture, self.pngs) if path is not None)
        settings: Record = {
            "name": self.name,
            "solver": sampler.method,
            "steps": sampler.steps,
            "guidance": sampler.guidance,
            "grid": repr(sampler.grid),
            "sigma": repr(sampler.sigma) if isinstance(sampler, SDESampler) else None,
        }
        self.identity = {**settings, **scored.guide_identity, **scored.identity, **scored.scorer.identity}

    def measure(self) -> Record:
        scored, scorer = self.scored, self.scored.scorer
        opened = new_folder(self.pngs, scorer.ranks) if self.pngs else nullcontext()
        with opened as folder, _counted_rows(scored.model, scored.guide) as rows:
            outcome = scorer.score(self._samples(folder), scored.weights, self.name)
        outcome["nfe"] = round(sum(rows) / max(self._drawn, 1), 1)  # rank 0, whose record counts, has drawn some
        if self.picture is not None:
            outcome["nearest"] = self._draw_neighbors(self.picture)
        return outcome

    @property
    def _drawn(self) -> int:
        """Number of samples that this rank draws, including those that fill the last batch."""
        size, ranks = self.scored.scorer.batch_size, self.scored.scorer.ranks
        return size * len(range(ranks.rank * size, self.scored.n, ranks.size * size))

    def _samples(self, folder: Path | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This rank's samples with their labels, saved as PNGs into the folder. Shows a bar on a terminal."""
        scored, ranks, size = self.scored, self.scored.scorer.ranks, self.scored.scorer.batch_size
        batches = generate(
            scored.model, self.sampler, scored.n, scored.seed, size, None, ranks.rank, ranks.size, scored.guide
        )
        for indices, samples in progress(batches, self._drawn // size, self.name, shown=ranks.rank == 0):
            images = quantize(samples)
            if folder is not None:
                save_pngs(folder, images, indices.start)
            yield images, balanced_labels(scored.model, indices)

    def _draw_neighbors(self, path: Path) -> list[float]:
        """Draw the first samples, each beside its nearest training images; return the smallest distance of each."""
        scored, scorer = self.scored, self.scored.scorer
        indices, dataset = torch.arange(self.neighbors), scorer.data.dataset("train")

        def first_samples() -> Tensor:
            labels = balanced_labels(scored.model, indices)
            seeds = image_seeds(scored.seed, indices)
            return to_uint8(self.sampler.sample(scored.model, seeds, labels, guide=scored.guide)).cpu()

        samples = scorer.ranks.from_first(first_samples)
        distances, nearest = nearest_in(dataset, scorer.features, samples, NEIGHBORS, scorer.batch_size, scorer.ranks)
        if scorer.ranks.rank == 0:
            rows = torch.cat(list(beside_neighbors(samples, nearest, dataset)))
            image_grid(rows, nearest.shape[1] + 1).save(path)
        return [round(distance, 4) for distance in distances[:, 0].tolist()]


class LikelihoodMeasurement(Measurement):
    """A model's bits per dimension of test images."""

    def __init__(self, scored: ScoredModel) -> None:
        self.scored = scored
        self.identity = {"name": "bpd", **scored.identity, "data": scored.scorer.data.fingerprint("test")}

    def measure(self) -> Record:
        scored, scorer = self.scored, self.scored.scorer
        started = time.perf_counter()
        outcome = bits_per_dimension(
            scored.model, scorer.data, scored.n, scored.seed, scorer.batch_size, scored.weights, scorer.ranks
        )
        return outcome | {"seconds": round(time.perf_counter() - started, 2)}


def _digest(model: GenerativeModel) -> str:
    """A hash of the weights, and one of the description of everything around them."""
    surroundings = hashlib.sha256(json.dumps(describe(model)).encode()).hexdigest()[:12]
    return f"{weights_digest(model.net.state_dict())} in {surroundings}"


@contextmanager
def _counted_rows(*models: GenerativeModel | None) -> Iterator[list[int]]:
    """The batch size of every evaluation of a network. Guidance doubles it, and a guide is evaluated as well.

    Counted at the model, around its network: torch.compile would compile a hook inside.
    """
    rows: list[int] = []
    counted = [model for model in models if model is not None]
    handles = [model.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0]))) for model in counted]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
