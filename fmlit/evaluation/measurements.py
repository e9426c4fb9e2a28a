"""What an evaluation measures: samples of a model, its likelihood, or anybody's images."""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmlit import solvers
from fmlit.core.errors import UserError
from fmlit.core.files import new_folder
from fmlit.core.progress import progress
from fmlit.core.randomness import image_seeds, training_generator
from fmlit.core.tensors import expand_time, to_uint8
from fmlit.data.image_files import read_images, save_pngs
from fmlit.data.stores import warn_of_uneven_classes
from fmlit.evaluation.results import Measurement, Record
from fmlit.evaluation.scoring import Scorer
from fmlit.flows.times import sampling_limits
from fmlit.metrics.features import weights_digest
from fmlit.metrics.image_quality import quantize
from fmlit.metrics.protocol import count_label
from fmlit.models.generative_model import GenerativeModel, evaluation_mode
from fmlit.sampling.drawing import image_grid
from fmlit.sampling.generate import balanced_labels, generate
from fmlit.sampling.guidance import guided_velocity
from fmlit.sampling.samplers import Sampler, SDESampler
from fmlit.solvers import likelihood
from fmlit.storage.descriptions import describe

NEIGHBORS = 7  # training images beside each sample


class ImageMeasurement(Measurement):
    """The scores of the images in a folder or an ``.npz``, whoever made them.

    Raises:
        UserError: the images do not have the shape of the data, see ``read_images``.
    """

    def __init__(self, scorer: Scorer, path: str) -> None:
        self.scorer, self.images = scorer, read_images(path, scorer.image_shape)
        if len(self.images):
            scorer.check(self.images[0][0].shape)
        identity = {"name": path, "n": len(self.images), "of": self.images.fingerprint()}
        self.identity = identity | scorer.identity

    def measure(self) -> Record:
        batches = self.scorer.batches(len(self.images))
        return self.scorer.score((self.images.batch(batch)[0], None) for batch in batches)


@dataclass(eq=False)
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
        UserError: n is below 2, or the model makes other images than the data or the reference file hold.
    """

    model: GenerativeModel
    weights: str
    scorer: Scorer
    n: int
    seed: int
    guide: GenerativeModel | None = None

    def __post_init__(self) -> None:
        if self.n < 2:
            raise UserError(f"n must be at least 2, got {self.n}")
        self.scorer.check(self.model.shape)
        if self.scorer.has_data:
            self._check_data()

    def _check_data(self) -> None:
        model, scorer = self.model, self.scorer
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
        named, real = model.class_names, scorer.data.class_names
        if named and real and named != tuple(real):
            raise UserError(
                f"the model's classes are [{', '.join(named)}], and those of the data [{', '.join(real)}]: "
                "give the data that it was trained on"
            )
        if model.num_classes is not None and scorer.distances and scorer.reference is None:
            warn_of_uneven_classes(scorer.data.dataset(scorer.splits[0]))

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
        sigma = repr(sampler.sigma) if isinstance(sampler, SDESampler) else None
        settings: Record = {"name": self.name, "solver": sampler.method, "steps": sampler.steps}
        settings |= {"guidance": sampler.guidance, "grid": repr(sampler.grid), "sigma": sigma}
        self.identity = {**settings, **scored.guide_identity, **scored.identity, **scored.scorer.identity}

    def measure(self) -> Record:
        scored, scorer = self.scored, self.scored.scorer
        rows: list[int] = []  # of each evaluation of a network; guidance doubles them, and a guide is evaluated as well
        with ExitStack() as stack:
            folder = stack.enter_context(new_folder(self.pngs, scorer.ranks)) if self.pngs else None
            # Counted at the model, around its network: torch.compile would compile a hook inside.
            for model in filter(None, (scored.model, scored.guide)):
                stack.enter_context(model.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0]))))
            outcome = scorer.score(self._samples(folder), scored.weights, self.name)
        drawn = len(scorer.batches(scored.n)) * scorer.batch_size  # with those that fill the last batch
        outcome["nfe"] = round(sum(rows) / max(drawn, 1), 1)  # rank 0, whose record counts, has drawn some
        if self.picture is not None:
            outcome["nearest"] = self._draw_neighbors(self.picture)
        return outcome

    def _samples(self, folder: Path | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This rank's samples with their labels, saved as PNGs into the folder. Shows a bar on a terminal."""
        scored, ranks, size = self.scored, self.scored.scorer.ranks, self.scored.scorer.batch_size
        batches = generate(
            scored.model, self.sampler, scored.n, scored.seed, size, None, ranks.rank, ranks.size, scored.guide
        )
        total = len(scored.scorer.batches(scored.n))
        for indices, samples in progress(batches, total, self.name, shown=ranks.rank == 0):
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
        distances, nearest = scorer.nearest(samples, NEIGHBORS)
        if scorer.ranks.rank == 0:
            rows = [
                (sample[None], dataset.batch(row)[0]) for sample, row in zip(samples, nearest.tolist(), strict=True)
            ]
            image_grid(torch.cat([image for row in rows for image in row]), nearest.shape[1] + 1).save(path)
        return [round(distance, 4) for distance in distances[:, 0].tolist()]


class LikelihoodMeasurement(Measurement):
    """Bits that a model needs per pixel and channel of n random test images, an upper bound.

    The mean over images of ``-log2 p(z) / dimensions``, with its standard error: by dopri5 at 1e-5, Hutchinson's
    estimate of the divergence and one draw of uniform dequantization per image. A conditional model is asked for
    p(z | label). The prior is the noise that a sampler of this model starts from. Where the model's clock ends before
    t = 1, z enters as ``alpha z``, whose density is that of z divided by ``alpha^dimensions``.
    """

    def __init__(self, scored: ScoredModel) -> None:
        self.scored = scored
        self.identity = {"name": "bpd", **scored.identity, "data": scored.scorer.data.fingerprint("test")}

    def measure(self) -> Record:
        started = time.perf_counter()
        model, ranks = self.scored.model, self.scored.scorer.ranks
        with ranks.fail_together(), evaluation_mode(model):
            bits = [torch.empty(0, dtype=torch.float64), *self._bits()]
        values = ranks.gather_rows(torch.cat(bits))
        label = count_label(len(values))
        kind = "conditional" if model.num_classes else "unconditional"
        return {
            "scores": {f"bpd_{label}": values.mean().item(), "bpd_error": values.std().item() / len(values) ** 0.5},
            "protocol": f"bpd{label}-test-dequantised-hutchinson-{kind}-{self.scored.weights}-dopri5",
            "seconds": round(time.perf_counter() - started, 2),
        }

    def _bits(self) -> Iterator[Tensor]:
        """The bits of each image in this rank's batches."""
        model, data, seed = self.scored.model, self.scored.scorer.data, self.scored.seed
        dataset, limits = data.dataset("test"), sampling_limits(model.path, model.prediction)
        times = torch.tensor(limits, dtype=torch.float64)
        chosen = np.random.default_rng(seed).permutation(len(dataset))[: self.scored.n]
        for batch in self.scored.scorer.batches(len(chosen)):
            images, labels = dataset.batch(chosen[batch].tolist())
            if images.dtype != torch.uint8:
                raise UserError(f"metric bpd needs 8-bit images, and {type(data).__name__} holds {images.dtype}")
            generator = training_generator(seed, batch.start, "bpd")
            z = likelihood.dequantize(images, generator).to(model.device)
            field = guided_velocity(model, None if model.num_classes is None else labels.to(model.device), 1.0)
            alpha = model.path.alpha(torch.full((len(z),), limits.end, device=z.device))
            z = expand_time(alpha, z) * z
            log_prob = likelihood.log_likelihood(field, z, times, "hutchinson", solvers.dopri5, generator, model.path)
            log_prob = log_prob + math.prod(model.shape) * alpha.log()
            yield likelihood.bits_per_dimension(log_prob, model.shape).double().cpu()


def _digest(model: GenerativeModel) -> str:
    """A hash of the weights, and one of the description of everything around them but for the names of the classes."""
    surroundings = describe(model)
    del surroundings["init_args"]["class_names"]
    code = hashlib.sha256(json.dumps(surroundings).encode()).hexdigest()[:12]
    return f"{weights_digest(model.net.state_dict())} in {code}"
