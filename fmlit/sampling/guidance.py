"""Guidance: push samples away from what a weaker field would do. Field in, field out.

Every guidance here is ``guide + scale (field - guide)``. The weights sum to 1, and velocity, score, noise and data are
affine in each other with the same slope for both fields, so it is the same guidance whichever of them is guided.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.tensors import Field, expand_time
from fmlit.models.generative_model import GenerativeModel

LabeledField = Callable[[Tensor, Tensor, Tensor], Tensor]
Interval = tuple[float, float]


def classifier_free(conditional: Field, unconditional: Field, scale: float, interval: Interval = (0.0, 1.0)) -> Field:
    """``u_uncond + scale (u_cond - u_uncond)`` (Ho & Salimans 2022; their w is scale - 1).

    Args:
        conditional, unconditional: fields (x (B, *shape), t (B,)) -> (B, *shape).
        scale: 1 is no guidance, 0 the unconditional field, above 1 trades diversity for fidelity to the condition.
        interval: closed range of t in which guidance acts (Kynkaanniemi et al. 2024). Elsewhere the conditional field
            is returned, and where that holds for the whole batch it alone is evaluated.

    Raises:
        UserError: a scale that is negative or not finite; an interval that is not 0 <= start < end <= 1.
    """
    return _extrapolate(conditional, lambda x, t: (conditional(x, t), unconditional(x, t)), scale, interval)


def autoguidance(model_field: Field, guide_field: Field, scale: float, interval: Interval = (0.0, 1.0)) -> Field:
    """``u_guide + scale (u_model - u_guide)``, the guide a smaller or less trained model of the same data.

    Arguments and errors as for ``classifier_free``. Corrects the model's errors, which the guide makes more strongly,
    and so needs neither labels nor a null label (Karras et al. 2024).
    """
    return _extrapolate(model_field, lambda x, t: (model_field(x, t), guide_field(x, t)), scale, interval)


def labeled_classifier_free(
    field: LabeledField, labels: Tensor, null_label: int | None, scale: float, interval: Interval = (0.0, 1.0)
) -> Field:
    """``classifier_free`` of one class-conditional field (x, t, labels), as a single evaluation of a doubled batch.

    Args:
        labels: int64 (B,), one for each sample of the x that the result will be given.
        null_label: the label with which the network was trained where labels were dropped.

    Raises:
        UserError: as for ``classifier_free``; guidance (a scale other than 1) without a null label.
    """
    if null_label is None and scale != 1:
        raise UserError("classifier-free guidance needs a null label: train with label dropping, or use scale 1")

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return field(x, t, labels)

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        doubled = torch.cat([labels, torch.full_like(labels, null_label)])  # type: ignore[arg-type]  # None left above
        with_label, without = field(torch.cat([x, x]), torch.cat([t, t]), doubled).chunk(2)
        return with_label, without

    return _extrapolate(conditional, both, scale, interval)


def _extrapolate(
    field: Field, field_and_guide: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], scale: float, interval: Interval
) -> Field:
    """The guided field; ``field`` alone serves where guidance does not act."""
    if not (math.isfinite(scale) and scale >= 0):
        raise UserError(f"guidance scale must be finite and at least 0, got {scale}")
    start, end = interval
    if not 0 <= start < end <= 1:
        raise UserError(f"guidance interval must satisfy 0 <= start < end <= 1, got {tuple(interval)}")
    if scale == 1:
        return field
    everywhere = start == 0 and end == 1  # asks nothing of t: a question would stall an accelerator's queue

    def guided(x: Tensor, t: Tensor) -> Tensor:
        inside = (t >= start) & (t <= end)
        if not everywhere and not inside.any():
            return field(x, t)
        u, guide = field_and_guide(x, t)
        # Rows outside keep u itself. They are evaluated with the rest: the fields may hold labels for the whole batch.
        return torch.where(expand_time(inside, x), guide + scale * (u - guide), u)

    return guided


def guided_velocity(model: GenerativeModel, labels: Tensor | None, scale: float) -> Field:
    """The model's velocity for these labels, under classifier-free guidance where ``scale`` is not 1."""
    if labels is None:
        if scale != 1:
            raise UserError(f"guidance {scale} needs a class-conditional model and labels")
        return model.velocity
    return labeled_classifier_free(model.velocity, labels, model.null_label, scale)


def autoguided_velocity(model: GenerativeModel, guide: GenerativeModel, labels: Tensor | None, scale: float) -> Field:
    """The model's velocity, pushed away from that of its guide, which may know no classes."""
    for what in ("shape", "path"):
        if getattr(guide, what) != getattr(model, what):
            raise UserError(
                f"the guide has the {what} {getattr(guide, what)}, the model {getattr(model, what)}: a guide is a "
                f"weaker model of the same data on the same path"
            )
    known = None if labels is None or guide.num_classes is None else checked_labels(guide, labels, labels)
    return autoguidance(guided_velocity(model, labels, 1.0), guided_velocity(guide, known, 1.0), scale)


def checked_labels(model: GenerativeModel, seeds: Tensor, labels: Tensor | None) -> Tensor | None:
    """The labels on the model's device; a UserError unless there is one for each seed, of the model's classes."""
    if labels is None:
        return None
    if model.num_classes is None:
        raise UserError("labels were given to an unconditional model; leave them out")
    if labels.shape != seeds.shape:
        raise UserError(f"labels must have the shape of seeds {tuple(seeds.shape)}, got {tuple(labels.shape)}")
    if len(labels) and not (labels.min() >= 0 and labels.max() < model.num_classes):
        wrong = labels[(labels < 0) | (labels >= model.num_classes)][0].item()
        raise UserError(f"class id {wrong} is unknown: this model has classes 0 to {model.num_classes - 1}")
    return labels.to(model.device)
