"""The velocity that a sampler follows: that of a model, for given labels, under guidance."""

from torch import Tensor

from fmlit import guidance
from fmlit.dynamics import Field
from fmlit.generative import GenerativeModel


def guided_velocity(model: GenerativeModel, labels: Tensor | None, scale: float) -> Field:
    """The model's velocity for these labels, under classifier-free guidance where ``scale`` is not 1."""
    if labels is None:
        if scale != 1:
            raise ValueError(f"guidance {scale} needs a class-conditional model and labels")
        return model.velocity
    return guidance.labelled_classifier_free(model.velocity, labels, model.null_label, scale)


def autoguided_velocity(model: GenerativeModel, guide: GenerativeModel, labels: Tensor | None, scale: float) -> Field:
    """The model's velocity, pushed away from that of its guide, which may know no classes."""
    for what in ("shape", "path"):
        if getattr(guide, what) != getattr(model, what):
            raise ValueError(
                f"the guide has the {what} {getattr(guide, what)}, the model {getattr(model, what)}: a guide is a "
                f"weaker model of the same data on the same path"
            )
    known = None if labels is None or guide.num_classes is None else checked_labels(guide, labels, labels)
    return guidance.autoguidance(guided_velocity(model, labels, 1.0), guided_velocity(guide, known, 1.0), scale)


def checked_labels(model: GenerativeModel, seeds: Tensor, labels: Tensor | None) -> Tensor | None:
    """The labels on the model's device; a ValueError unless there is one for each seed, of the model's classes."""
    if labels is None:
        return None
    if model.num_classes is None:
        raise ValueError("labels were given to an unconditional model; leave them out")
    if labels.shape != seeds.shape:
        raise ValueError(f"labels must have the shape of seeds {tuple(seeds.shape)}, got {tuple(labels.shape)}")
    if len(labels) and not (labels.min() >= 0 and labels.max() < model.num_classes):
        wrong = labels[(labels < 0) | (labels >= model.num_classes)][0].item()
        raise ValueError(f"class id {wrong} is unknown: this model has classes 0 to {model.num_classes - 1}")
    return labels.to(model.device)
