"""Models and data sets out of checkpoints, run folders and exported folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fmlit.core.errors import UserError
from fmlit.core.files import expand
from fmlit.data.data_module import DataModule
from fmlit.models.generative_model import GenerativeModel
from fmlit.storage import checkpoints, descriptions, exports
from fmlit.storage.checkpoints import StrPath
from fmlit.storage.run_folder import RunFolder


def load(
    path: StrPath, weights: str = "ema", trust: Sequence[str] = (), device: torch.device | str = "cpu"
) -> GenerativeModel:
    """Load a trained model, in evaluation mode.

    The model is built from the description that was stored with its weights, so nothing else is needed::

        model = fmlit.load("runs/quickstart")

    Args:
        path: a checkpoint; the folder of a run, for its newest checkpoint; or an exported folder.
        weights: "raw" for the trained weights, the name of an average, or "ema" for the first average. An exported
            folder holds one set of weights, which "ema" and its own name stand for.
        trust: packages besides fmlit whose classes may be built, see ``descriptions.build``.
        device: where to put the model.

    Raises:
        UserError: there is no such model or no such weights, a file is damaged, or a class is not trusted.
    """
    source = find_model(path)
    if source.is_dir():
        weights_of(source, weights)
        return exports.load(source, trust, device)
    return _load_checkpoint(source, weights, trust).to(device).eval()


def find_model(path: StrPath, option: str | None = None) -> Path:
    """The checkpoint file, or the exported folder, that a path stands for: of a run folder, its newest checkpoint.

    Raises:
        UserError: there is none. The message names the ``option`` of the command line that was given the path.
    """
    found = expand(path, option or "")
    if (found / exports.DESCRIPTION).is_file():
        return found
    file = RunFolder(found).last if found.is_dir() else found
    if not file.is_file():
        give = f"give --{option}" if option else "give"
        raise UserError(f"there is no checkpoint {file}: {give} a .ckpt file, the folder of a run, or an exported one")
    return file


def weights_of(source: Path, weights: str) -> str:
    """The name of the weights that ``load`` takes: ``weights`` itself, or of an exported folder the name it states.

    Raises:
        UserError: the folder was exported from other weights.
    """
    if not source.is_dir():
        return weights
    stored = exports.read_description(source).get("weights", "ema")
    if weights not in ("ema", stored):
        raise UserError(f"{source} holds the weights {stored!r} and no {weights!r}; leave weights out, or load its run")
    return stored


def _load_checkpoint(path: Path, weights: str, trust: Sequence[str]) -> GenerativeModel:
    checkpoint = checkpoints.load(path)
    if "model_description" not in checkpoint:
        raise UserError(f"checkpoint {path} does not describe its model: it was not written by an fmlit module")
    try:
        return descriptions.build_model(checkpoint["model_description"], _select_weights(checkpoint, weights), trust)
    except UserError as error:  # any other error is a bug in a class of the user's own
        raise UserError(f"checkpoint {path}: {error}") from error


def _select_weights(checkpoint: dict[str, Any], weights: str) -> dict[str, Any]:
    """The state dict of the net."""
    if weights == "raw":
        trained = _dict(checkpoint, "state_dict")
        return {name.removeprefix("model.net."): v for name, v in trained.items() if name.startswith("model.net.")}
    averaged = _dict(checkpoint, "ema")
    name = next(iter(averaged), weights) if weights == "ema" and "ema" not in averaged else weights
    if name not in averaged:
        raise UserError(f"it holds no weights {weights!r}; choose one of: {', '.join(['raw', *averaged])}")
    return averaged[name]


def _dict(checkpoint: dict[str, Any], key: str) -> dict[str, Any]:
    value = checkpoint.get(key) or {}
    if not (isinstance(value, dict) and all(isinstance(name, str) for name in value)):
        raise UserError(f"its {key} is a {type(value).__qualname__}, and not a dict of names")
    return value


def training_data(checkpoint: Path | None, trust: Sequence[str] = ()) -> DataModule:
    """The data set that a checkpoint was trained on, built from the description in it.

    Raises:
        UserError: there is no checkpoint, it is an exported folder, or its data set cannot be built.
    """
    if checkpoint is None:
        raise UserError("give --data, or the --checkpoint of a model that was trained on them")
    if checkpoint.is_dir():
        raise UserError(f"{checkpoint} is an export, which does not name its training data; give them by --data")
    try:
        return descriptions.build(checkpoints.load(checkpoint).get("data_description", {}), trust, DataModule)
    except UserError as error:
        raise UserError(f"the training data of {checkpoint} cannot be built ({error}); give them by --data") from error
