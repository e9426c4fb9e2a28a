"""What the scripts that start from a checkpoint share: typed options, the checkpoint, the device, a line of JSON."""

import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import ActionConfigFile
from jsonargparse.typing import register_type

from fmlit.cli import errors
from fmlit.cli.parsing import Parser, switch_on
from fmlit.core.errors import UserError
from fmlit.core.processes import ProcessGroup


class Integers(tuple[int, ...]):
    """Whole numbers: ``5,10,20`` on the command line."""


class Numbers(tuple[float, ...]):
    """Numbers: ``1.0,1.5`` on the command line."""


class Names(tuple[str, ...]):
    """Words: ``fid,kid`` on the command line."""


def _register(many: type, one: type, example: str) -> None:
    def read(value: Any) -> Any:
        items = value if isinstance(value, list | tuple) else str(value).split(",")
        try:
            return many(one(item.strip() if isinstance(item, str) else item) for item in items)
        except ValueError as error:
            raise UserError(f"expected values such as {example}") from error

    register_type(many, serializer=list, deserializer=read)


_register(Integers, int, "5,10,20")
_register(Numbers, float, "1.0,1.5")
_register(Names, str, "one,two")


def run(command: Callable[..., dict[str, Any] | None], args: Sequence[str], program: str | None = None) -> None:
    """Call ``command`` with options from the command line, then print what it returns as one line of JSON.

    The signature is the list of options, the docstring their help. A parameter whose type is a dataclass stands for the
    fields of that class: they are options beside the others. ``--save-images`` is the same as ``--save_images``, and a
    switch on its own is on. A ``command`` that returns None (on every rank but the first) prints nothing. The
    usage line names ``program``, by default the script.
    """
    groups = _groups(command)
    with errors.one_line_errors(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        parser = Parser(
            description=(inspect.getdoc(command) or "").partition("\n\nArgs:")[0],
            usage=f"{program or Path(sys.argv[0]).name} [--KEY VALUE ...]",
            allow_abbrev=False,
        )
        parser.add_argument("--config", action=ActionConfigFile, help="Path to a configuration file.")
        parser.add_function_arguments(command, as_group=False, skip=set(groups), sub_configs=True)
        for group in groups.values():
            parser.add_class_arguments(group, sub_configs=True)
        args = [re.sub(r"^--[\w.-]+", lambda name: "--" + name[0][2:].replace("-", "_"), arg) for arg in args]
        args = switch_on(args, {f"--{option.name}" for option in options_of(command) if option.annotation is bool})
        options = vars(parser.instantiate(parser.parse_args(args)))
        del options["config"]
        for name, group in groups.items():
            options[name] = group(**{field.name: options.pop(field.name) for field in fields(group)})
        summary = command(**options)
        if summary is not None:
            print(json.dumps(summary), flush=True)


def options_of(command: Callable[..., Any]) -> list[inspect.Parameter]:
    """The options of a command: its parameters, and in place of a dataclass the fields of that."""
    groups = _groups(command)
    parameters = inspect.signature(command).parameters.values()
    return [option for p in parameters for option in (options_of(groups[p.name]) if p.name in groups else [p])]


def _groups(command: Callable[..., Any]) -> dict[str, Any]:
    """The dataclasses among the types of a command's parameters, by the parameter's name."""
    parameters = inspect.signature(command).parameters.values()
    return {parameter.name: parameter.annotation for parameter in parameters if is_dataclass(parameter.annotation)}


def _show_warning(*args: Any, **_: Any) -> None:
    """Print a warning without the line of code that it comes from."""
    print(f"warning: {args[0]}", file=sys.stderr, flush=True)


def choose_device(device: str) -> torch.device:
    """``auto`` is this process's GPU if there is one, else the CPU."""
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (AssertionError, RuntimeError) as error:  # no such device, or a torch without support for it
        raise UserError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); try auto or cpu") from error
    return torch.device(device)


@contextmanager
def processes(device: torch.device) -> Iterator[ProcessGroup]:
    """All processes of torchrun, joined for the length of the block; a process that was started alone stays alone."""
    joined = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if joined:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield ProcessGroup.current()
    finally:
        if joined:
            dist.destroy_process_group()
