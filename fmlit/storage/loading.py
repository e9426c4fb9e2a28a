"""Models and data sets out of checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fmlit.core.errors import UserError
from fmlit.data import DataModule
from fmlit.models.generative_model import GenerativeModel
from fmlit.storage import checkpoints, descriptions
from fmlit.storage.checkpoints import StrPath, load


def load_model(
    path: StrPath, weights: str = "ema", trust: Sequence[str] = (), device: torch.device | str = "cpu"
) -> GenerativeModel:
    """The model of a checkpoint, in evaluation mode, built from the description in it.

    Args:
        path: the checkpoint.
        weights: "raw" for the trained weights, the name of an averaged copy, or "ema" for the first of these.
        trust: packages besides fmlit whose classes may be built, see ``descriptions.build``.
        device: where to put the model.
    """
    checkpoint = load(path)
    if "model_description" not in checkpoint:
        raise UserError(f"checkpoint {path} does not describe its model: it was not written by an fmlit module")
    try:
        model = descriptions.build(checkpoint["model_description"], trust)
        if not isinstance(model, GenerativeModel):
            raise UserError(f"it describes a {type(model).__qualname__}, not a GenerativeModel")
        state = _select_weights(checkpoint, weights)
        _check_fit(state, model.net.state_dict())
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path}: {error}") from error
    model.net.load_state_dict(state)
    return model.to(device).eval()


def _select_weights(checkpoint: dict[str, Any], weights: str) -> dict[str, Any]:
    """The state dict of the net."""
    if weights == "raw":
        trained = checkpoint.get("state_dict", {})
        return {name.removeprefix("model.net."): v for name, v in trained.items() if name.startswith("model.net.")}
    averaged = checkpoint.get("ema") or {}
    name = next(iter(averaged), weights) if weights == "ema" and "ema" not in averaged else weights
    if name not in averaged:
        raise UserError(f"it holds no weights {weights!r}; choose one of: {', '.join(['raw', *averaged])}")
    return averaged[name]  # type: ignore[no-any-return]


def _check_fit(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    problems = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": [name for name in wanted if name in given and given[name].shape != wanted[name].shape],
    }
    found = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"its weights do not fit the network that it describes: {'; '.join(found)}")


def training_data(checkpoint: Path | None, trust: Sequence[str] = ()) -> DataModule:
    """The data set that a checkpoint was trained on, built from the description in it."""
    if checkpoint is None:
        raise UserError("give --data, or the --checkpoint of a model that was trained on them")
    try:
        data = descriptions.build(checkpoints.load(checkpoint).get("data_description", {}), trust)
        if not isinstance(data, DataModule):
            raise UserError(f"it describes a {type(data).__qualname__}, not data")
    except ValueError as error:
        raise UserError(f"the training data of {checkpoint} cannot be built ({error}); give them by --data") from error
    return data
