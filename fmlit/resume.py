"""Where a resumed run goes on, and whether its checkpoint belongs to the model that is configured."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fmlit.checkpoints import load, newest_valid
from fmlit.descriptions import describe
from fmlit.modules import GenerativeModule

MOST_DIFFERENCES = 3


class Start(NamedTuple):
    """Where training starts: at the beginning, or with the state of a checkpoint after so many steps."""

    checkpoint: str | None = None
    step: int = 0


def find_start(folder: Path, module: GenerativeModule, required: bool) -> Start:
    """The newest checkpoint of a run folder, once it verifies and fits the module. For rank 0.

    Args:
        folder: the run folder.
        module: what will be trained.
        required: there must be one. A requeued job may not have saved any yet, and starts at the beginning.

    Raises:
        ValueError: there is none, or it is of another model; the message names the keys that differ.
    """
    checkpoints = folder / "checkpoints"
    if not required and not any(checkpoints.glob("*.ckpt")):
        return Start()
    path = newest_valid(checkpoints)
    checkpoint = load(path)
    differences = list(_differences(checkpoint.get("model_description"), describe(module.model), "model"))
    differences = differences or list(_differences(_shapes(checkpoint["state_dict"]), _shapes(module.state_dict())))
    if differences:
        more = len(differences) - MOST_DIFFERENCES
        listed = ", ".join(differences[:MOST_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")
        raise ValueError(
            f"{listed}: {path} holds another model; resume with the configuration in {folder / 'config.yaml'}, or "
            f"start a new run without --resume"
        )
    return Start(str(path), int(checkpoint["global_step"]))


def _differences(there: Any, here: Any, key: str = "") -> Iterator[str]:
    """``model.net.channels (64 there, 32 here)`` for each place at which two descriptions differ."""
    if isinstance(there, Mapping) and isinstance(here, Mapping) and there.get("class_path") == here.get("class_path"):
        for name in {**here, **there}:
            inner = key if name == "init_args" else f"{key}.{name}".strip(".")
            yield from _differences(there.get(name, "nothing"), here.get(name, "nothing"), inner)
    elif _plain(there) != _plain(here):
        yield f"{key} ({_plain(there)} there, {_plain(here)} here)"


def _plain(value: Any) -> Any:
    """An object by its class; sequences alike, as files make no difference between lists and tuples."""
    if isinstance(value, Mapping):
        return value.get("class_path", dict(value))
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _shapes(state: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name.replace("_orig_mod.", ""): list(value.shape) for name, value in state.items()}
