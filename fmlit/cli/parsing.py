"""How command lines and recipes are read: help that leads on, errors in one line, checks that are not the parser's."""

import argparse
import copy
import inspect
import pydoc
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

import fmlit
from fmlit.cli import errors, messages
from fmlit.cli.messages import join_keys
from fmlit.cli.recipes import config_files
from fmlit.core.errors import MISTAKES, FileError, UserError
from fmlit.training.lightning_internals import forget_defaults_of_replaced_classes, pass_null_to_nested_options

# So that short names work: --model.net UNet.
for _module in set(fmlit.PUBLIC.values()):
    import_module(_module)

# The same value everywhere: set once, under the second key, and not where it would be overwritten.
LINKS = {
    "model.schedule.images": "images",
    "model.seed": "seed_everything",
    "data.seed": "seed_everything",
    "model.shape": "data.shape",
    "model.num_classes": "data.num_classes",
}


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the lines of the description, and of the subclasses of a type names fmlit's where it has any."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text

    def _get_help_string(self, action: Any) -> str:
        text = super()._get_help_string(action)
        listed = re.search(r"(?<=, known subclasses: )[\w., ]+", text)
        ours = [name for name in listed[0].split(", ") if name.startswith("fmlit.")] if listed else []
        return text.replace(listed[0], ", ".join(ours)) if listed and ours else text


class Parser(LightningArgumentParser):
    """Reports a mistake in one line. What a configured class raises passes as it is.

    jsonargparse tries the types of a union in turn, and takes whatever is raised there for a value of another type.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        forget_defaults_of_replaced_classes()
        pass_null_to_nested_options()
        super().__init__(*args, **{"formatter_class": HelpFormatter, "allow_abbrev": False, **kwargs})
        self._class: Any = None

    @property
    def _nested(self) -> bool:
        """Whether this parser reads the arguments of a class, for an outer parser that knows the whole key."""
        return not self.exit_on_error

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if self._nested and nested_key is None:
            self._class = theclass
        if not (issubclass(theclass, Logger) and "save_dir" in _arguments(theclass)):
            return super().add_class_arguments(theclass, nested_key, *args, **kwargs)
        # Lightning's loggers require it, or write into the working directory.
        kwargs["skip"] = {*kwargs.get("skip", ()), "save_dir"}
        added = super().add_class_arguments(theclass, nested_key, *args, **kwargs)
        option = join_keys(nested_key or "", "save_dir")
        self.add_argument(f"--{option}", type=str | None, help="Folder for its files. Null means the run folder.")
        return added

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        return self._unmasked(super().parse_args, *args, **kwargs)

    def instantiate(self, namespace: jsonargparse.Namespace, *args: Any, **kwargs: Any) -> Any:
        """Build all that is configured; a ``UserError`` of a constructor is headed by the key of its object."""
        if self._nested:
            return super().instantiate(namespace, *args, **kwargs)
        namespace = copy.deepcopy(namespace)
        for group in self._action_groups:
            if hasattr(group, "instantiate_class"):
                namespace[f"{group.dest}.{_KEY}"] = group.dest
        _hand_out_keys(namespace)
        builders = [(_build, object, True)]
        return self._unmasked(super().instantiate, namespace, *args, instantiators=builders, **kwargs)

    def _unmasked(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call, and raise the first error that the user's own code raises there, rather than what becomes of it."""
        if not self._nested:
            _raised.clear()
        try:
            return call(*args, **kwargs)
        except Exception:
            if self._nested or not _raised:
                raise
        error = _raised[0]
        _raised.clear()
        raise error  # outside of the handler, or the handled error would become its context

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if (path := messages.class_path(message)) and (own := _module_error(path)):
            _raised.append(own)
        if errors.debugging() or _raised:
            raise argparse.ArgumentError(None, message) from ex
        options = [action.dest for action in self._actions]
        line = messages.one_line(message, options, self._class, _arguments(self._class))
        if self._nested:
            raise argparse.ArgumentError(None, line) from ex
        errors.exit_with(messages.finish(line, self._keys))

    def _keys(self) -> list[str]:
        """All keys of the command line, with those of the classes that its recipe names."""
        self.exit_on_error = False
        try:
            config = self.parse_args([f"--config={path}" for path in config_files(self.args)])
        except argparse.ArgumentError:
            config = self.get_defaults()
        finally:
            self.exit_on_error = True
        return [join_keys(key) for key in dict(config.items())]


COUNTS = {"images", "every", "n", "warmup_images", "stable_images", "max_steps", "batch_size"}
THOUSANDS = {"k": 10**3, "m": 10**6}
_KEY = "__key__"  # the argument by which a constructor's key reaches _build
_raised: list[Exception] = []  # by the user's own code, while a parser of jsonargparse runs


def _hand_out_keys(value: Any, key: str = "") -> None:
    """Give every object that is configured by a class path its key, among the arguments that no parser looks at."""
    if isinstance(value, list | tuple):
        for item in value:
            _hand_out_keys(item, key)
    elif isinstance(value, jsonargparse.Namespace | dict):
        for name, inner in list((value if isinstance(value, dict) else vars(value)).items()):
            _hand_out_keys(inner, join_keys(key, str(name)))
        if isinstance(value.get("class_path"), str):
            value["dict_kwargs"] = {**(value.get("dict_kwargs") or {}), _KEY: key}


def _build(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Build a configured object. A mistake of the user gets its key; any other error is the constructor's own."""
    key = kwargs.pop(_KEY, "")
    try:
        return cls(*args, **kwargs)
    except Exception as error:
        if isinstance(error, MISTAKES) and len(error.args) == 1:  # the system's own have a number, too
            error.args = (messages.headed(str(error), key, _arguments(cls)),)
        _raised.append(error)
        raise


def _module_error(class_path: str) -> Exception | None:
    """What the module of a class raises when it is imported; None where it is merely not there.

    jsonargparse takes some of these errors for a wrong value. They belong to whoever wrote the module.
    """
    module = class_path.rpartition(".")[0]
    try:
        if module:
            import_module(module)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        return None if missing and f"{module}.".startswith(f"{missing}.") else error
    return None


def _arguments(cls: Any) -> list[str]:
    return list(inspect.signature(cls).parameters) if cls is not None else []


def switch_on(args: Sequence[str], switches: Container[str]) -> list[str]:
    """The command line with ``=true`` behind each switch that stands without a value."""
    alone = [arg in switches and after.startswith("-") for arg, after in zip(args, [*args[1:], "-"], strict=False)]
    return [f"{arg}=true" if on else arg for arg, on in zip(args, alone, strict=True)]


def tidy(args: Sequence[str]) -> list[str]:
    """The command line with underscores in names of options, and with counts such as 1e6, 64k and 2M written out."""
    tidied: list[str] = []
    option = ""  # the one that waits for its value
    for arg in args:
        name, equals, value = arg.partition("=") if arg.startswith("--") else (option, "", arg)
        name = f"--{name[2:].replace('-', '_')}" if name else ""
        counts = name.rpartition(".")[2].lstrip("-") in COUNTS
        number = re.fullmatch(r"(\d+(?:\.\d+)?)(?:(k|m)|e\+?(\d))", value, re.IGNORECASE) if counts else None
        if number:
            count = Decimal(number[1]) * (10 ** int(number[3]) if number[3] else THOUSANDS[number[2].lower()])
            value = str(int(count)) if count == int(count) else value
        if arg.startswith("--"):
            option = "" if equals else name
            tidied.append(f"{name}{equals}{value}")
        else:
            option = ""
            tidied.append(value)
    return tidied


def check_arguments(args: Sequence[str]) -> None:
    """What the parser would say without naming the file, or would not say at all.

    Raises:
        Exception: whatever the module of a class raises that a configuration file names.
        UserError: a configuration file cannot be read or is not YAML, or a key takes its value from elsewhere.
    """
    given = [join_keys(option[1]) for arg in args if (option := re.match(r"--([\w.]+)", arg))]
    for path in config_files(args):
        given += _keys(_read_yaml(path))
    for key in given:
        if key in LINKS:
            raise UserError(f"{key}: takes its value from {LINKS[key]}; leave it out")
        if key.startswith("quality.sampler.") and not {"quality.sampler", "quality.sampler.help"} & set(given):
            raise UserError(f"{key}: scores use samples.sampler, unless --quality.sampler names a class, as ODESampler")


def check_network(config: Mapping[str, Any]) -> None:
    """Raise a UserError unless the configured network takes the shape and the classes of the data, which are handed to
    it by position: a width that stands in their place would get them, and labels would be dropped silently."""
    class_path = config.get("model.init_args.net.class_path")
    network: Any = pydoc.locate(class_path) if class_path else config.get("model.init_args.net")
    if callable(network):
        class_path = class_path or f"{network.__module__}.{network.__qualname__}"
        takes = list(inspect.signature(network).parameters)
        if takes[:2] != ["shape", "num_classes"]:
            raise UserError(
                f"model.net: {class_path} must take shape and num_classes as its first two arguments, in that order; "
                f"it takes {', '.join(takes) or 'none'}"
            )


def _read_yaml(path: Path) -> Any:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(
            f"config: cannot read {path} ({getattr(error, 'strerror', 'it is not a text file')})"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"config: {path}{where}: {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict | None):
        raise UserError(f"config: {path} must hold keys and values, not a {type(content).__name__}")
    return content


def _keys(content: Any, key: str = "") -> Iterator[str]:
    for name, value in content.items() if isinstance(content, dict) else ():
        inner = join_keys(key, str(name))
        if name == "class_path" and isinstance(value, str) and (error := _module_error(value)):
            raise error
        yield inner
        yield from _keys(value, inner)
