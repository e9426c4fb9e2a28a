"""The cells of an evaluation: what the scores of each depend on, and how they are found."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.files import new_folder
from fmlit.core.progress import progress
from fmlit.core.randomness import image_seeds
from fmlit.core.tensors import to_uint8
from fmlit.data.image_files import read_images, save_pngs
from fmlit.evaluation.reports import Record
from fmlit.evaluation.scoring import Scorer, beside_neighbors, bits_per_dimension, nearest_in
from fmlit.metrics.features import weights_digest
from fmlit.metrics.image_quality import quantize
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.drawing import image_grid
from fmlit.sampling.generate import balanced_labels, generate
from fmlit.sampling.samplers import Sampler, SDESampler
from fmlit.storage.descriptions import describe

NEIGHBORS = 7  # training images beside each sample


@dataclass(frozen=True)
class Cell:
    """One line of the results.

    Attributes:
        identity: everything that the scores depend on.
        measure: finds them; all ranks call it.
        files: what it leaves behind besides.
    """

    identity: Record
    measure: Callable[[], Record]
    files: tuple[Path, ...] = ()


def images_cell(scorer: Scorer, path: str) -> Cell:
    """Scores of the pictures in a folder or an ``.npz``, whoever made them."""
    dataset = read_images(path, scorer.data.shape)

    def share() -> Iterator[tuple[Tensor, None]]:
        ranks, size = scorer.ranks, scorer.batch_size
        for start in range(ranks.rank * size, len(dataset), ranks.size * size):
            yield dataset.batch(range(start, min(start + size, len(dataset))))[0], None

    identity = {"name": path, "n": len(dataset), "of": dataset.fingerprint(), **scorer.identity}
    return Cell(identity, lambda: scorer.score(share()))


class ModelCells:
    """The cells of one model: of its samples, and of its likelihood.

    Args:
        model: what is scored.
        weights: which of its checkpoint's weights these are, as protocols state it.
        scorer: of the data that it was trained on; samples come in batches of the same size as real images.
        n: number of samples, and the most test images whose likelihood is taken.
        seed: of both.
        guide: a weaker model, for autoguidance.
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
        self.guide = guide
        self.model, self.weights, self.scorer, self.n, self.seed = model, weights, scorer, n, seed
        self.identity: Record = {
            "weights": weights,
            "of": _digest(model),
            "n": n,
            "seed": seed,
            "batch_size": scorer.batch_size,
        }

    def samples(self, sampler: Sampler, folder: Path, neighbours: int = 0, save_images: Path | None = None) -> Cell:
        """Scores of n samples; nearest neighbours go into ``folder``, and all samples below ``save_images``."""
        name = sampler.named(guided=self.guide is not None)
        identity = {
            "name": name,
            "solver": sampler.method,
            "steps": sampler.steps,
            "guidance": sampler.guidance,
            "grid": repr(sampler.grid),
            "sigma": repr(sampler.sigma) if isinstance(sampler, SDESampler) else None,
        }
        identity |= {} if self.guide is None else {"guide": _digest(self.guide)}
        label = f"{name}-{self.weights}-{self.n}-seed{self.seed}"
        picture = folder / f"neighbours-{label}.png" if neighbours else None
        pngs = save_images / label if save_images else None

        def measure() -> Record:
            opened = new_folder(pngs, self.scorer.ranks) if pngs else nullcontext()
            with opened as target, _counted_rows(self.model, self.guide) as rows:
                outcome = self.scorer.score(self._stream(sampler, target), self.weights, name)
            outcome["nfe"] = round(sum(rows) / max(self._drawn, 1), 1)  # rank 0, whose record counts, has drawn some
            if picture is not None:
                outcome["nearest"] = self._draw_neighbors(sampler, neighbours, picture)
            return outcome

        files = tuple(path for path in (picture, pngs) if path is not None)
        return Cell({**identity, **self.identity, **self.scorer.identity}, measure, files)

    def likelihood(self) -> Cell:
        """Bits per dimension of test images."""
        scorer = self.scorer

        def measure() -> Record:
            started = time.perf_counter()
            outcome = bits_per_dimension(
                self.model, scorer.data, self.n, self.seed, scorer.batch_size, self.weights, scorer.ranks
            )
            return outcome | {"seconds": round(time.perf_counter() - started, 2)}

        return Cell({"name": "bpd", **self.identity, "data": scorer.data.fingerprint("test")}, measure)

    @property
    def _drawn(self) -> int:
        """Samples that this rank draws, with what pads the last batch."""
        size, ranks = self.scorer.batch_size, self.scorer.ranks
        return size * len(range(ranks.rank * size, self.n, ranks.size * size))

    def _stream(self, sampler: Sampler, target: Path | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This rank's share of the samples, with a bar on a terminal."""
        ranks, size = self.scorer.ranks, self.scorer.batch_size
        batches = generate(self.model, sampler, self.n, self.seed, size, None, ranks.rank, ranks.size, self.guide)
        name = sampler.named(guided=self.guide is not None)
        for indices, samples in progress(batches, self._drawn // size, name, shown=ranks.rank == 0):
            images = quantize(samples)
            if target is not None:
                save_pngs(target, images, indices.start)
            yield images, balanced_labels(self.model, indices)

    def _draw_neighbors(self, sampler: Sampler, count: int, path: Path) -> list[float]:
        """A picture of the first samples, each beside its nearest training images; their distances, nearest first."""
        scorer, indices = self.scorer, torch.arange(count)

        def first_samples() -> Tensor:
            labels = balanced_labels(self.model, indices)
            return to_uint8(sampler.sample(self.model, image_seeds(self.seed, indices), labels, guide=self.guide)).cpu()

        samples, dataset = scorer.ranks.from_first(first_samples), scorer.data.dataset("train")
        distances, nearest = nearest_in(dataset, scorer.features, samples, NEIGHBORS, scorer.batch_size, scorer.ranks)
        if scorer.ranks.rank == 0:
            rows = torch.cat(list(beside_neighbors(samples, nearest, dataset)))
            image_grid(rows, nearest.shape[1] + 1).save(path)
        return [round(distance, 4) for distance in distances[:, 0].tolist()]


def _digest(model: GenerativeModel) -> str:
    """Of weights and all that surrounds them."""
    surroundings = hashlib.sha256(json.dumps(describe(model)).encode()).hexdigest()[:12]
    return f"{weights_digest(model.net.state_dict())} in {surroundings}"


@contextmanager
def _counted_rows(*models: GenerativeModel | None) -> Iterator[list[int]]:
    """The batch size of every evaluation of a network: guidance doubles it, and a guide is evaluated as well.

    Counted at the model, around its network: a hook inside would be compiled.
    """
    rows: list[int] = []
    counted = [model for model in models if model is not None]
    handles = [model.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0]))) for model in counted]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
