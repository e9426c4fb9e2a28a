"""The loggers of a recipe, which write into the run folder unless it names another."""

import inspect
import pydoc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import Logger

from fmlit.cli.parsing import Parser
from fmlit.storage.run_folder import RunFolder


def build_loggers(config: Any, folder: RunFolder) -> list[Any]:
    """Build what ``trainer.logger`` configures, once the run folder is known.

    A logger that takes ``save_dir``, such as Lightning's for TensorBoard, CSV files and MLflow, gets the run folder
    where the recipe gives none, or its own default below the run folder: MLflow's files lie in ``mlruns``.

    Args:
        config: the parsed value: one logger or several. None, True and False add no logger.
        folder: the run folder.

    Raises:
        UserError: a logger refuses its arguments. The message starts with the key.
    """
    configured = [item for item in as_list(config) if isinstance(item, Namespace)]
    if not configured:
        return []
    placed = [_placed(item, folder.path) for item in configured]
    parser = Parser()
    parser.add_argument("--trainer.logger", type=Iterable[Logger])
    return list(parser.instantiate(Namespace(trainer=Namespace(logger=placed)))["trainer.logger"])


def _placed(item: Namespace, folder: Path) -> Namespace:
    item = item.clone()
    init_args = item.get("init_args") or {}
    if "save_dir" in init_args and init_args["save_dir"] is None:
        cls: Any = pydoc.locate(item["class_path"])  # the parser has found it
        default = inspect.signature(cls).parameters["save_dir"].default
        init_args["save_dir"] = str(folder / default) if isinstance(default, str) else str(folder)
    return item


def as_list(value: Any) -> list[Any]:
    """One value or several as a list; empty for None."""
    return [item for item in (value if isinstance(value, list) else [value]) if item is not None]
