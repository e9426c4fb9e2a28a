"""How command lines and recipes are read: help that leads on, errors in one line, checks that are not the parser's."""

import argparse
import difflib
import inspect
import itertools
import pydoc
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import _typehints
from lightning.pytorch.cli import LightningArgumentParser

import fmlit
from fmlit.cli import errors
from fmlit.core.errors import UserError

HELP = """Train an image generator by flow matching or score matching.

  train.py                                                 the quickstart: handwritten digits in a minute
  train.py --config configs/cifar10_flow.yaml              a recipe; configs/ has more
  train.py --config FILE --model.net.channels 64           with any key changed
  train.py --config FILE --print_config                    every key and its value, without training
  train.py --config FILE --resume                          go on with the newest run of that name
  train.py --config runs/NAME/config.yaml --resume         the same, with all options that the run had

The arguments of the model, of its parts and of the data depend on their class, and are listed by
  train.py --model.help FlowMatchingModule                 ScoreMatchingModule
  train.py --model.net.help fmlit.UNet                     fmlit.MLP
  train.py --model.path.help CondOTPath                    CosinePath, PolynomialPath, VPPath
  train.py --model.optimizer.help fmlit.Muon               fmlit.AdamW, fmlit.TorchOptimizer
  train.py --data.help CIFAR10                             Digits, MNIST, ImageFolder, ...
  train.py --samples.sampler.help ODESampler               SDESampler
  train.py --trainer.logger.help fmlit.WandbLogger
"""

# So that short names work: --model.net UNet.
for _module in set(fmlit.PUBLIC.values()):
    import_module(_module)

# The same value everywhere: set once, and not where it would be overwritten.
LINKS = {
    "model.schedule.images": "images",
    "model.seed": "seed_everything",
    "data.seed": "seed_everything",
    "model.shape": "the data",
    "model.num_classes": "the data",
}


_discard_what_does_not_fit = _typehints.discard_init_args_on_class_path_change


def _discard_defaults_of_another_class(parser: Any, before: Any, now: Mapping[str, Any]) -> None:
    """What was the default of one class does not become the value of the next, even where their names are the same.

    jsonargparse keeps all that fits (its issue 460): an SDESampler would get the 18 steps that are the default of
    ODESampler, which stood there before, in place of its own 250. What the user has set is kept.
    """
    if before and "init_args" in before and before["class_path"] != now["class_path"]:
        defaults = _typehints.ActionTypeHint.get_class_parser(before["class_path"], {}).get_defaults()
        given = before["init_args"]
        for name in [name for name in vars(given) if name in defaults and given[name] == defaults[name]]:
            del given[name]
    _discard_what_does_not_fit(parser, before, now)


_typehints.discard_init_args_on_class_path_change = _discard_defaults_of_another_class

_adapt_class_type = _typehints.adapt_class_type


def _adapt_class_type_with_null(value: Any, *args: Any, **kwargs: Any) -> Any:
    """Let ``--model.execution.compile null`` mean None: jsonargparse 4.53 hands the text "None" to the inner parser."""
    inner = value.get("init_args") if isinstance(value, jsonargparse.Namespace) else None
    if isinstance(inner, _typehints.NestedArg) and inner.val is None:
        value["init_args"] = inner._replace(val="null")
    return _adapt_class_type(value, *args, **kwargs)


_typehints.adapt_class_type = _adapt_class_type_with_null


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
    """Errors in one line, with the nearest known option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        if not self.exit_on_error or errors.debugging():  # of a nested class: the outer parser knows the whole key
            raise argparse.ArgumentError(None, message) from ex
        errors.exit_with(message, [action.dest for action in self._actions])


def config_files(args: Sequence[str]) -> list[Path]:
    """The files that a command line names with ``--config``."""
    apart = [value for option, value in itertools.pairwise(args) if option in ("-c", "--config")]
    joined = [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    return [Path(path) for path in (*apart, *joined)]


def check_arguments(args: Sequence[str]) -> None:
    """What the parser would say without naming the file, or would not say at all.

    Raises:
        OSError: a configuration file cannot be read.
        UserError: it is not YAML, or a key is set that takes its value from elsewhere.
    """
    given = [errors.join_keys(option[1]) for arg in args if (option := re.match(r"--([\w.]+)", arg))]
    for path in config_files(args):
        given += _keys(_read_yaml(path))
    for key in given:
        if key in LINKS:
            raise UserError(f"{key}: takes its value from {LINKS[key]}; leave it out")


def check_network(config: Mapping[str, Any]) -> None:
    """Raise a UserError unless the configured network takes the shape and the classes of the data, which are handed to
    it by position: a width that stands in their place would get them, and labels would be dropped silently."""
    class_path = config.get("model.init_args.net.class_path")
    network: Any = pydoc.locate(class_path) if class_path else None
    if network is not None:
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
        near = difflib.get_close_matches(
            path.name, [other.name for other in path.parent.glob("*.yaml")], n=1, cutoff=errors.CLOSE
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near and not path.exists() else ""
        raise OSError(f"config: cannot read {path} ({getattr(error, 'strerror', 'it is no text')}){hint}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"config: {path}{where}: {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict | None):
        raise UserError(f"config: {path} must hold keys and values, not a {type(content).__name__}")
    return content


def _keys(content: Any, key: str = "") -> Iterator[str]:
    for name, value in content.items() if isinstance(content, dict) else ():
        inner = errors.join_keys(key, str(name))
        yield inner
        yield from _keys(value, inner)
