"""Exactly n samples of a model, the same ones for any number of processes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.randomness import image_seeds
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.samplers import Sampler


def balanced_labels(model: GenerativeModel, indices: Sequence[int] | Tensor) -> Tensor | None:
    """Labels of samples ``indices`` of a class-balanced collection: ``i mod num_classes``; None without classes."""
    return None if model.num_classes is None else torch.as_tensor(indices, dtype=torch.int64) % model.num_classes


def generate(
    model: GenerativeModel,
    sampler: Sampler,
    n: int,
    seed: int = 0,
    batch_size: int = 256,
    labels: Tensor | None = None,
    rank: int = 0,
    world_size: int = 1,
    guide: GenerativeModel | None = None,
) -> Iterator[tuple[range, Tensor]]:
    """This rank's share of exactly ``n`` samples, as (indices, samples (b, *shape)).

    Batch j always holds samples jB ... jB + B - 1, the last one padded, and batches are dealt to ranks in turn: sample
    i does not depend on the world size. ``labels`` (n,) defaults to classes in turn.
    """
    if n < 1 or batch_size < 1:
        raise UserError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
    if labels is not None and len(labels) != n:
        raise UserError(f"labels must have one entry for each of the {n} samples, got {len(labels)}")
    for start in range(rank * batch_size, n, world_size * batch_size):
        indices = torch.arange(start, start + batch_size).clamp(max=n - 1)
        batch_labels = balanced_labels(model, indices) if labels is None else labels[indices]
        kept = range(start, min(start + batch_size, n))
        options: dict[str, Any] = {} if guide is None else {"guide": guide}  # others' samplers may know none
        yield kept, sampler.sample(model, image_seeds(seed, indices), batch_labels, **options)[: len(kept)]
