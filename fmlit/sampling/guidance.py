"""Guidance: push samples away from what a weaker field would do.

Every guidance is ``guide + scale (field - guide)``, with an unconditional field as the guide in classifier-free
guidance, and a weaker model in autoguidance. The weights sum to 1, and velocity, score, noise and data are affine in
each other with the same slope for both fields. So it makes no difference which of them is guided.

``classifier_free``, ``classifier_free_by_label`` and ``autoguidance`` take any fields. ``guided_velocity`` applies them
to a ``GenerativeModel``, and is what samplers follow.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.tensors import Field, expand_time
from fmlit.models.generative_model import GenerativeModel

LabelField = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x: (B, *shape), t: (B,), labels: (B,)) -> like x
Interval = tuple[float, float]
WHOLE_CLOCK: Interval = (0.0, 1.0)


def classifier_free(conditional: Field, unconditional: Field, scale: float, interval: Interval = WHOLE_CLOCK) -> Field:
    """``u_uncond + scale (u_cond - u_uncond)`` (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).

    Args:
        conditional: the field for the labels, (x (B, *shape), t (B,)) -> (B, *shape).
        unconditional: the field without labels, of the same form.
        scale: 1 disables guidance, 0 gives the unconditional field, and above 1 samples lose diversity and gain
            fidelity to the condition. The paper's w is scale - 1.
        interval: closed range of t in which guidance acts (Kynkaanniemi et al. 2024,
            https://arxiv.org/abs/2404.07724). Elsewhere the result is the conditional field. Where that holds for the
            whole batch, only the conditional field is evaluated.

    Raises:
        UserError: a scale that is negative or not finite; an interval that is not 0 <= start < end <= 1.
    """
    return _extrapolate(conditional, lambda x, t: (conditional(x, t), unconditional(x, t)), scale, interval)


def classifier_free_by_label(
    field: LabelField, labels: Tensor, null_label: int | None, scale: float, interval: Interval = WHOLE_CLOCK
) -> Field:
    """``classifier_free`` of one class-conditional field, which is evaluated once on a batch of twice the size.

    Args:
        field: (x (B, *shape), t (B,), labels (B,)) -> (B, *shape).
        labels: int64 (B,), one for each sample of the x that the result will be given.
        null_label: the label that the network was trained with where labels were dropped.

    Raises:
        UserError: as for ``classifier_free``; guidance (a scale other than 1) without a null label.
    """
    if null_label is None and scale != 1:
        raise UserError("classifier-free guidance needs a null label: train with label dropping, or use scale 1")
    both_labels = torch.cat([labels, torch.full_like(labels, null_label or 0)])

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return field(x, t, labels)

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with_label, without = field(torch.cat([x, x]), torch.cat([t, t]), both_labels).chunk(2)
        return with_label, without

    return _extrapolate(conditional, both, scale, interval)


def autoguidance(field: Field, guide: Field, scale: float, interval: Interval = WHOLE_CLOCK) -> Field:
    """``u_guide + scale (u - u_guide)``, with the guide of a smaller or less trained model of the same data.

    It corrects the errors that both make, and the guide more strongly. So it needs neither labels nor a null label
    (Karras et al. 2024, https://arxiv.org/abs/2406.02507). Arguments and errors are those of ``classifier_free``.
    """
    return _extrapolate(field, lambda x, t: (field(x, t), guide(x, t)), scale, interval)


def _extrapolate(
    field: Field, field_and_guide: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], scale: float, interval: Interval
) -> Field:
    """The guided field. ``field`` alone serves where guidance does not act."""
    check_guidance(scale, interval)
    if scale == 1:
        return field
    start, end = interval
    everywhere = start == 0 and end == 1  # asks nothing of t: a question would stall an accelerator's queue

    def guided(x: Tensor, t: Tensor) -> Tensor:
        inside = (t >= start) & (t <= end)
        if not everywhere and not inside.any():
            return field(x, t)
        u, guide = field_and_guide(x, t)
        # Rows outside keep u itself. They are evaluated with the rest: the fields may hold labels for the whole batch.
        return torch.where(expand_time(inside, x), guide + scale * (u - guide), u)

    return guided


def check_guidance(scale: float, interval: Interval) -> None:
    """Raise a UserError that names the value which guidance would refuse."""
    if not (math.isfinite(scale) and scale >= 0):
        raise UserError(f"guidance: the scale must be finite and at least 0, got {scale}")
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(f"guidance_interval must satisfy 0 <= start < end <= 1, got {tuple(interval)}")


def guided_velocity(
    model: GenerativeModel,
    labels: Tensor | None,
    scale: float,
    interval: Interval = WHOLE_CLOCK,
    guide: GenerativeModel | None = None,
) -> Field:
    """The model's velocity for these labels with guidance: autoguidance where there is a guide, else classifier-free.

    Args:
        labels: int64 (B,) on the model's device, or None for the unconditional velocity.
        scale: the guidance scale, as for ``classifier_free``.
        interval: the range of t in which guidance acts, as for ``classifier_free``.
        guide: a weaker model of the same data on the same path. It may be unconditional.

    Raises:
        UserError: as for ``classifier_free``; classifier-free guidance without labels; a guide of other data or on
            another path.
    """
    if guide is not None:
        for what in ("shape", "path"):
            if getattr(guide, what) != getattr(model, what):
                raise UserError(
                    f"the guide has the {what} {getattr(guide, what)}, the model {getattr(model, what)}: a guide is a "
                    f"weaker model of the same data on the same path"
                )
        known = None if labels is None or guide.num_classes is None else check_labels(guide, labels, labels)
        return autoguidance(guided_velocity(model, labels, 1.0), guided_velocity(guide, known, 1.0), scale, interval)
    if labels is not None:
        return classifier_free_by_label(model.velocity, labels, model.null_label, scale, interval)
    if scale != 1:
        raise UserError(f"guidance {scale} needs a class-conditional model and labels")
    return model.velocity


def check_labels(model: GenerativeModel, seeds: Tensor, labels: Tensor | None) -> Tensor | None:
    """The labels on the model's device. A UserError unless there is one for each seed, of the model's classes."""
    if labels is None:
        return None
    if model.num_classes is None:
        raise UserError("labels were given to an unconditional model; leave them out")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise UserError(f"labels must be an int64 tensor of class ids, got {got}")
    if labels.shape != seeds.shape:
        raise UserError(f"labels must have the shape of seeds {tuple(seeds.shape)}, got {tuple(labels.shape)}")
    if len(labels) and not (labels.min() >= 0 and labels.max() < model.num_classes):
        wrong = labels[(labels < 0) | (labels >= model.num_classes)][0].item()
        raise UserError(f"labels: class id {wrong} is unknown: this model has classes 0 to {model.num_classes - 1}")
    return labels.to(model.device)
