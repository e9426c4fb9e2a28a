"""Where a run starts: anew, with the weights of another run, or where it was interrupted; and whether these fit."""

import inspect
import logging
import pydoc
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fmlit.core.errors import UserError
from fmlit.storage.checkpoints import load as load_checkpoint, newest_valid
from fmlit.storage.descriptions import check_tensors, class_paths, describe
from fmlit.storage.loading import find_model, load
from fmlit.storage.run_folder import RunFolder
from fmlit.training.modules import GenerativeModule

log = logging.getLogger(__name__)

MOST_DIFFERENCES = 3
COUPLED = "model.coupled"  # how noise and data are coupled may change in the course of a run


class Start(NamedTuple):
    """Where training starts: at the beginning, or with the state of a checkpoint after so many steps and images.

    ``weights`` is where the network of a new run comes from, if it does not start from scratch.
    """

    checkpoint: str | None = None
    step: int = 0
    images: int = 0
    weights: str | None = None


def find_start(folder: RunFolder, module: GenerativeModule, required: bool) -> Start:
    """The newest checkpoint of a run folder, once it verifies and fits the module. For rank 0.

    Args:
        folder: the run folder.
        module: what will be trained.
        required: there must be one. A requeued job may not have saved any yet, and starts at the beginning.

    Raises:
        UserError: there is none, or it is of another model; the message names the keys that differ.
    """
    if not required and not folder.has_checkpoints():
        return Start()
    path = newest_valid(folder.checkpoints)
    checkpoint = load_checkpoint(path)
    try:
        class_paths(checkpoint.get("model_description"))
        check_tensors(checkpoint.get("state_dict"))
        step, images = int(checkpoint["global_step"]), int(checkpoint["images_seen"])
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:  # it may hold anything
        raise UserError(f"{path} is not an fmlit checkpoint: {error}; start a new run without --resume") from error
    differences = list(_differences(checkpoint.get("model_description"), describe(module.model), "model"))
    differences = differences or list(_differences(_shapes(checkpoint["state_dict"]), _shapes(module.state_dict())))
    differences = differences or list(
        _differences(checkpoint.get("optimizer"), module.optimizer.kind, "model.optimizer")
    )
    if differences:
        remedy = f"resume with the configuration in {folder.config}, or start a new run without --resume"
        raise UserError(f"{_listed(differences)}: {path} holds another model; {remedy}")
    return Start(str(path), step, images)


def take_weights(path: str, module: GenerativeModule) -> None:
    """Give the module's network the weights of a trained one. Nothing else is taken.

    A description may name classes of fmlit, and of the modules from which the configured model itself comes.

    Args:
        path: a checkpoint, of which the first average counts; the folder of a run, for its newest checkpoint; or a
            folder that ``fmlit export`` wrote.
        module: what will be trained.

    Raises:
        UserError: there is no such model, it cannot be built, or its network is another one; the message names the
            tensors that differ.
    """
    parts = describe(module.model)["init_args"]
    trust = [parts[name]["class_path"].rpartition(".")[0] for name in ("net", "path", "prediction")]
    try:
        found = find_model(path, "start_from")
        model = load(found, trust=trust)
        weights = model.net.state_dict()
    except (FileNotFoundError, UserError) as error:
        raise UserError(f"start_from: {error}") from error
    if differences := list(_differences(_shapes(weights), _shapes(module.model.net.state_dict()))):
        problem = f"{_listed(differences)}: {found} holds another network"
        remedy = "give model.net the arguments that it was trained with, on data with as many classes"
        raise UserError(f"start_from: {problem}; {remedy}, or start without it")
    there, here = model.class_names, module.model.class_names
    if there and here and there != here:
        log.warning("start_from: the classes of %s are %s, and are now %s", found, _shorten(there), _shorten(here))
    module.model.net.load_state_dict(weights)


def _listed(differences: list[str]) -> str:
    more = len(differences) - MOST_DIFFERENCES
    return ", ".join(differences[:MOST_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")


def _differences(there: Any, here: Any, key: str = "") -> Iterator[str]:
    """``model.net.channels (64 there, 32 here)`` for each place at which two descriptions differ."""
    if isinstance(there, Mapping) and isinstance(here, Mapping) and there.get("class_path") == here.get("class_path"):
        there = _completed(there, here)
        for name in {**here, **there}:
            inner = key if name == "init_args" else f"{key}.{name}".strip(".")
            yield from _differences(there.get(name, "nothing"), here.get(name, "nothing"), inner)
    elif _plain(there) != _plain(here) and key != COUPLED:
        yield f"{key[:200]} ({_shorten(_plain(there))} there, {_shorten(_plain(here))} here)"


def _completed(there: Mapping[str, Any], here: Mapping[str, Any]) -> Mapping[str, Any]:
    """A description with the defaults of arguments that its class did not have yet when it was written.

    A default of None leaves the value to the class, which then is what the other description says.
    """
    if not {"class_path", "init_args"} <= here.keys():
        return there
    given = there.get("init_args", {})
    cls: Any = pydoc.locate(here["class_path"])  # it exists
    parameters = inspect.signature(cls).parameters
    new = [name for name in here["init_args"] if name not in given and name in parameters]
    defaults = {name: parameters[name].default for name in new}
    filled = {name: here["init_args"][name] if value is None else value for name, value in defaults.items()}
    return {**there, "init_args": {**filled, **given}}


def _plain(value: Any) -> Any:
    """An object by its class; sequences alike, as files make no difference between lists and tuples."""
    if isinstance(value, Mapping):
        return value.get("class_path", dict(value))
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _shorten(value: Any) -> str:
    """A value in a message. Names of classes are listed without quotes."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        value = f"[{', '.join(value)}]"
    return textwrap.shorten(str(value), 300, placeholder=" ...")


def _shapes(state: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}
