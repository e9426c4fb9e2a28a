"""Exactly n samples of a model, the same ones for any number of processes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.randomness import image_seeds
from fmlit.flows.diffusions import Diffusion
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.build import build_sampler
from fmlit.sampling.grids import Grid
from fmlit.sampling.guidance import WHOLE_CLOCK, Interval
from fmlit.sampling.samplers import Precision, Sampler, SolverName
from fmlit.solvers.records import Option


def sample(
    model: GenerativeModel,
    n: int = 16,
    labels: int | Sequence[int] | Tensor | None = None,
    seed: int = 0,
    solver: SolverName = "midpoint",
    steps: int | None = 10,
    guidance: float = 1.0,
    *,
    guidance_interval: Interval = WHOLE_CLOCK,
    grid: Grid | None = None,
    sigma: Diffusion | float | None = None,
    options: Mapping[str, Option] | None = None,
    guide: GenerativeModel | None = None,
    precision: Precision = "float32",
    batch_size: int = 256,
) -> Tensor:
    """Draw n samples of a model.

    ``fmlit.load(path)`` returns the model of a checkpoint. Any other model works the same way:

    >>> import fmlit
    >>> net = fmlit.MLP((1, 8, 8), num_classes=10)
    >>> model = fmlit.GenerativeModel(net, fmlit.CondOTPath(), fmlit.Velocity(), (1, 8, 8), num_classes=10)
    >>> images = fmlit.sample(model, n=6, labels=[3, 7], solver="unipc", steps=5, guidance=1.5)
    >>> images.shape, images.min() >= -1, images.max() <= 1
    (torch.Size([6, 1, 8, 8]), tensor(True), tensor(True))

    Args:
        model: what to sample from.
        n: number of samples. A larger n adds samples to the same first ones.
        labels: a class id, or several that are dealt in turn. None deals all classes of the model in turn.
        seed: seed of the noise. Sample i depends on the seed and on i.
        solver: any of the names in ``fmlit.solvers.SOLVERS``.
        steps: number of steps; None stands for the default of the sampler.
        guidance: scale of classifier-free guidance, or of autoguidance where there is a guide. 1 disables guidance.
        guidance_interval: range of t in which guidance acts, from 0 (noise) to 1 (data).
        grid: where the steps lie; None stands for the default of the sampler.
        sigma: the diffusion coefficient of an SDE solver. A number stands for a constant.
        options: options of the solver, such as ``{"order": 3}`` for unipc.
        guide: a weaker model of the same data, for autoguidance.
        precision: arithmetic of the network, "float32" or "bfloat16".
        batch_size: samples at a time.

    Returns:
        (n, *shape) float32 on the model's device. Images (C, H, W) are clamped to [-1, 1]; other data is not.

    Raises:
        UserError: an unknown solver, option or class; a value out of range; guidance that the model cannot have.
    """
    sampler = build_sampler(solver, steps, grid, guidance, sigma, precision, guidance_interval, options)
    sampler.check(model, guide)
    batches = generate(model, sampler, n, seed, min(batch_size, n), deal_labels(model, n, labels), guide=guide)
    samples = torch.cat([batch for _, batch in batches])
    return samples.clamp(-1, 1) if len(model.shape) == 3 else samples


def deal_labels(model: GenerativeModel, n: int, labels: int | Sequence[int] | Tensor | None = None) -> Tensor | None:
    """The labels (n,) of n samples: these class ids in turn, by default all classes; None for a model without any."""
    if labels is None:
        return balanced_labels(model, range(n))
    if model.num_classes is None:
        raise UserError("labels were given to an unconditional model; leave them out")
    try:
        ids = torch.as_tensor(labels).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    if not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(f"labels must be a class id or several, such as 3 or [3, 7], got {labels!r}")
    return ids.long()[torch.arange(n) % len(ids)]


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

    Batch j always holds samples jB ... jB + B - 1, and the last one is padded. Batches are dealt to ranks in turn, so
    sample i does not depend on the world size. ``labels`` (n,) defaults to classes in turn.
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
