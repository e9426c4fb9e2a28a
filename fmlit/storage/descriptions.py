"""Models as plain data: what a checkpoint says about the classes and arguments that its model is made of.

A description is ``{"class_path": "fmlit.VPPath", "init_args": {"rate_min": 0.1, "rate_max": 20.0}}``, nested
where an argument is such an object itself. It is read off one convention: every constructor argument is kept as an
attribute of the same name. It holds None, bool, int, float, str, lists, tuples and dicts only, so that it fits into
checkpoints that are loaded with ``weights_only`` and into JSON (which turns tuples into lists).

Checkpoints come from strangers: ``build`` takes a description for what it is, a list of code to run.
"""

import importlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

import fmlit
from fmlit.core.errors import UserError
from fmlit.data.data_module import DataModule
from fmlit.flows.paths import GaussianPath
from fmlit.flows.predictions import Prediction
from fmlit.models.generative_model import GenerativeModel

Description = dict[str, Any]

BASES = (GaussianPath, Prediction, nn.Module, DataModule)  # what a model is made of, and what it was trained on
UNET2D = "diffusers.UNet2DModel"
MAX_DEPTH = 100  # of plain data in a file: Python's own recursion ends at 1,000


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
            is not a description.
    """
    built = _construct(description, _classes(description, trust))
    if not isinstance(built, kind):
        raise UserError(f"it describes a {type(built).__qualname__}, not a {kind.__qualname__}")
    return built


def build_model(description: Description, weights: Mapping[str, Tensor], trust: Sequence[str] = ()) -> GenerativeModel:
    """The model that ``describe`` described, with these weights of its network.

    Where all classes are those of fmlit and diffusers, the model is first built without memory, on torch's device
    "meta". So a description of something huge costs nothing.

    Raises:
        UserError: as for ``build``, or weights that are none, or do not fit the network.
    """
    check_tensors(weights)
    classes = _classes(description, trust)
    if all(_is_within(cls.__module__, ("fmlit", "diffusers")) for cls in classes.values()):
        with torch.device("meta"), _no_larger_than(weights):
            rehearsed = build(description, trust, GenerativeModel)
        _check_fit(weights, rehearsed.net.state_dict())
    model = build(description, trust, GenerativeModel)
    _check_fit(weights, model.net.state_dict())
    model.net.load_state_dict(weights)
    return model


def check_depth(value: Any) -> None:
    """Raise a UserError for plain data that are nested deeper than any that fmlit writes."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for part in level if isinstance(part, (dict, list, tuple)) for item in _items(part)]
        if not level:
            return
    raise UserError(f"its data are nested more than {MAX_DEPTH} deep")


def _items(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def check_tensors(weights: Any) -> None:
    """Raise a UserError for weights that are not a dict of plain tensors, or are not all stored."""
    if not isinstance(weights, Mapping):
        raise UserError(f"its weights are a {type(weights).__qualname__}, not a dict of tensors")
    stored, numbers = {}, 0
    for name, tensor in weights.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise UserError(f"its weight {_shorten(name)} is a {type(tensor).__qualname__}, not a tensor")
        dense = tensor.layout is torch.strided and tensor.device.type != "meta"
        if not dense or tensor.is_nested or tensor.is_quantized:
            raise UserError(f"its weight {_shorten(name)} is not a plain tensor")
        storage, numbers = tensor.untyped_storage(), numbers + tensor.numel()
        stored[storage.data_ptr()] = storage.nbytes()
    if numbers > sum(stored.values()):  # a view of one number may have any shape
        raise UserError(f"its weights have {numbers:,} numbers, and it stores {sum(stored.values()):,} bytes of them")


@contextmanager
def _no_larger_than(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """End the construction of a network that has far more parameters than there are weights."""
    left = 2 * len(weights) + 100  # a constructor may replace parameters

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(f"its weights do not fit the network that it describes: {len(weights)} are too few")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_fit(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    problems = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": [name for name in wanted if name in given and given[name].shape != wanted[name].shape],
    }
    found = [
        f"{len(names)} {kind} ({', '.join(name[:100] for name in names[:3])})"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise UserError(f"its weights do not fit the network that it describes: {'; '.join(found)}")


def class_paths(description: Any) -> list[str]:
    """All names of classes in a description. A UserError for anything that is not a description."""
    if not (isinstance(description, dict) and "class_path" in description):
        raise UserError(f"a description is a dict with class_path and init_args, got {_shorten(description)}")
    check_depth(description)
    return [nested["class_path"] for nested in _nested(description)]


def _classes(description: Description, trust: Sequence[str]) -> dict[str, type]:
    """All classes that a description names, once all of them are found to be allowed."""
    trust = [trust] if isinstance(trust, str) else trust
    named_classes = class_paths(description)
    for class_path in named_classes:
        module, _, name = class_path.rpartition(".")
        named = class_path == UNET2D or (module == "fmlit" and name in fmlit.PUBLIC) or _is_within(module, trust)
        if not (named and all(part.isidentifier() for part in class_path.split("."))):
            raise _refusal(class_path)
    return {class_path: _import(class_path, trust) for class_path in named_classes}


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
        message = textwrap.shorten(str(error), 600)
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
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
