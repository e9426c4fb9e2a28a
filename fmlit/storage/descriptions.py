"""Models as plain data: what a checkpoint says about the classes and arguments that its model is made of.

A description is ``{"class_path": "fmlit.VPPath", "init_args": {"rate_min": 0.1, "rate_max": 20.0}}``, nested
where an argument is such an object itself. It is read off one convention: every constructor argument is kept as an
attribute of the same name. It holds None, bool, int, float, str, lists, tuples and dicts only, so that it fits into
checkpoints that are loaded with ``weights_only`` and into JSON (which turns tuples into lists).

Checkpoints come from strangers: ``build`` takes a description for what it is, a list of code to run.
"""

import importlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

import fmlit
from fmlit.core.errors import UserError
from fmlit.data.data_module import DataModule
from fmlit.flows.paths import GaussianPath
from fmlit.flows.predictions import Prediction

Description = dict[str, Any]

BASES = (GaussianPath, Prediction, nn.Module, DataModule)  # what a model is made of, and what it was trained on
UNET2D = "diffusers.UNet2DModel"


def describe(obj: Any) -> Description:
    """``{"class_path": ..., "init_args": {...}}`` of a model, network, path or prediction; all arguments resolved.

    Raises:
        UserError: a constructor argument is not an attribute of the same name, or its value is not plain data.
    """
    cls = type(obj)
    if not isinstance(obj, BASES):
        raise UserError(f"only networks, paths, predictions and data can be described, got a {cls.__qualname__}")
    if "." in cls.__qualname__:
        raise UserError(f"{cls.__qualname__} could not be found again: define it at the top level of a module")
    parameters = inspect.signature(cls).parameters
    if cls.__name__ == "UNet2DModel" and cls.__module__.startswith("diffusers."):
        class_path, values = UNET2D, dict(cast(Any, obj).config)  # where diffusers keeps the arguments
    else:
        class_path = class_name(cls)
        values = {name: getattr(obj, name) for name in parameters if hasattr(obj, name)}
    for name, parameter in parameters.items():
        if name not in values or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UserError(
                f"{cls.__qualname__} cannot be written into a checkpoint: keep its constructor argument {name!r}, like "
                f"every other, as an attribute of the same name"
            )
    arguments = {name: _plain(values[name], f"{cls.__qualname__}.{name}") for name in parameters}
    return {"class_path": class_path, "init_args": arguments}


def class_name(cls: type) -> str:
    """``fmlit.UNet`` for a public class of fmlit, ``package.module.Class`` for any other."""
    public = fmlit.PUBLIC.get(cls.__name__) == cls.__module__
    return f"fmlit.{cls.__name__}" if public else f"{cls.__module__}.{cls.__qualname__}"


def _plain(value: Any, where: str) -> Any:
    """The value as plain data; exact types, since a subclass (np.float64 is a float) would not load as weights_only."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple, torch.Size):
        items = [_plain(item, where) for item in value]
        return items if type(value) is list else tuple(items)
    if type(value) is dict and "class_path" not in value and all(type(key) is str for key in value):
        return {key: _plain(item, where) for key, item in value.items()}
    if isinstance(value, BASES):
        return describe(value)
    raise UserError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be written into a checkpoint: "
        f"use None, bool, int, float, str, a list, tuple or dict of these, or a network, path or prediction"
    )


def build(description: Description, trust: Sequence[str] = (), kind: type = object) -> Any:
    """The object of this ``kind`` that ``describe`` described, newly constructed.

    Only networks, paths, predictions and data modules are built: the public ones of fmlit, those of the packages in
    ``trust``, and ``diffusers.UNet2DModel``. All names are checked before the first import, and all classes before the
    first one is built.

    Raises:
        UserError: a class outside of these, an unknown or unfit argument, an object of another kind, or something that
            is no description.
    """
    if not (isinstance(description, dict) and "class_path" in description):
        raise UserError(f"a description is a dict with class_path and init_args, got {_shorten(description)}")
    trust = [trust] if isinstance(trust, str) else trust
    class_paths = [nested["class_path"] for nested in _nested(description)]
    for class_path in class_paths:
        module, _, name = class_path.rpartition(".")
        named = class_path == UNET2D or (module == "fmlit" and name in fmlit.PUBLIC) or _is_within(module, trust)
        if not (named and all(part.isidentifier() for part in class_path.split("."))):
            raise _refusal(class_path)
    classes = {class_path: _import(class_path, trust) for class_path in class_paths}
    built = _construct(description, classes)
    if not isinstance(built, kind):
        raise UserError(f"it describes a {type(built).__qualname__}, not a {kind.__qualname__}")
    return built


def _nested(value: Any) -> Iterator[Description]:
    """All descriptions within a value, outermost first."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = value.get("init_args", {})
        known = value.keys() <= {"class_path", "init_args"}
        if not (known and isinstance(value["class_path"], str) and isinstance(arguments, dict)):
            raise UserError(f"a description has class_path, a str, and init_args, a dict, got {_shorten(value)}")
        yield value
        value = arguments
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise UserError(f"names of arguments in a description must be str, got {_shorten(list(value))}")
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _nested(item)
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise UserError(f"a description holds plain data only, got a {type(value).__qualname__}")


def _import(class_path: str, trust: Sequence[str]) -> type:
    module_name, _, name = class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise UserError(f"{class_path} cannot be imported: {error}; install its package or set PYTHONPATH") from error
    # The module that defines the class counts, not the one it was found in: my_package.os is the same as os.
    home = {"fmlit": ("fmlit",), "diffusers": ("diffusers",)}.get(module_name, trust)
    if not (isinstance(cls, type) and issubclass(cls, BASES) and _is_within(cls.__module__, home)):
        raise _refusal(class_path)
    return cls


def _construct(value: Any, classes: dict[str, type]) -> Any:
    if isinstance(value, (list, tuple)):
        items = [_construct(item, classes) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {key: _construct(item, classes) for key, item in value.items()}
    arguments = {name: _construct(item, classes) for name, item in value.get("init_args", {}).items()}
    cls = classes[value["class_path"]]
    try:
        return cls(**arguments)
    except Exception as error:  # a constructor may say anything about arguments that a file made up
        arguments_fit = not isinstance(error, UserError) and _accepts(cls, arguments)
        if arguments_fit and not _is_within(cls.__module__, ("fmlit", "diffusers")):
            raise  # a bug in a class of the user's own
        message = " ".join(str(error).split())
        raise UserError(f"{value['class_path']} cannot be built from its description: {message}") from error


def _accepts(cls: type, arguments: dict[str, Any]) -> bool:
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError:
        return False
    return True


def _is_within(dotted: str, packages: Sequence[str]) -> bool:
    return any(dotted == package or dotted.startswith(f"{package}.") for package in packages)


def _refusal(class_path: str) -> UserError:
    return UserError(
        f"{_shorten(class_path)} is refused: a checkpoint may name the public networks, paths and predictions of fmlit "
        f"and {UNET2D}; to build classes of another package, sample, evaluate and export take --trust PACKAGE, "
        f"fmlit.load takes trust=['PACKAGE'], and train takes a configuration that names them"
    )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
