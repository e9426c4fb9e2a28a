"""Errors for people: one line that names the key, file or value and the way out, and exit code 2."""

import contextlib
import difflib
import inspect
import os
import pydoc
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only

import fmlit

# What users can cause: values, files, and what libraries say of either. All else is a bug and keeps its traceback, and
# so does a TypeError once everything is built: that is for whoever wrote the network.
RUNNING_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, MisconfigurationException)
USER_ERRORS = (*RUNNING_ERRORS, TypeError)

RANK_0_FIRST_S = 5.0
CLOSE = 0.75  # similarity of names above which one may have been meant for the other

# What jsonargparse says around the one thing that matters.
_NOISE = re.compile(
    r"Subtypes:|Errors:|Given value|Does not validate|Expected a path but|Expected a <class 'NoneType'>$"
)


def debugging() -> bool:
    """Whether ``FMLIT_DEBUG=1`` asks for tracebacks."""
    return os.environ.get("FMLIT_DEBUG", "0") not in ("", "0")


@contextlib.contextmanager
def one_line_errors(
    kinds: tuple[type[Exception], ...] = USER_ERRORS, memory: str = "try a smaller --batch_size"
) -> Iterator[None]:
    """End the program with exit code 2 and one line on stderr where an error of these kinds is raised.

    A lost connection ends it with 1, as it is worth another try, and mistakes are not. ``FMLIT_DEBUG=1`` shows the
    traceback instead.

    Args:
        kinds: what to take for a mistake.
        memory: what to do where there is not enough of it.
    """
    looked_at: tuple[type[Exception], ...] = (RuntimeError, *kinds)
    try:
        yield
    except looked_at as error:
        short = _out_of_memory(error)
        if debugging() or not (short or isinstance(error, kinds)):
            raise
        message = f"{short}: {memory}" if short else f"{error}" or type(error).__name__
        exit_with(message, code=1 if isinstance(error, ConnectionError) else 2)


def _out_of_memory(error: Exception) -> str:
    """In short, if that is what the error says, wherever it was raised: constructors' errors come wrapped."""
    said = isinstance(error, torch.OutOfMemoryError) or re.search("CUDA out of memory|DefaultCPUAllocator", f"{error}")
    if not said:
        return ""
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", f"{error}", re.IGNORECASE)
    return f"out of memory{f', {asked[1]} were asked for' if asked else ''}"


def exit_with(message: str, keys: Iterable[str] = (), code: int = 2) -> NoReturn:
    """Print the condensed message and exit.

    Of several processes rank 0 speaks for all. The others give it time to fail as well, which ends them or orphans
    them; where it goes on, the mistake is theirs alone and they say it.
    """
    rank = getattr(rank_zero_only, "rank", 0)
    parent = os.getppid()
    if rank:
        time.sleep(RANK_0_FIRST_S)
    if os.getppid() == parent:
        print(f"error: {f'rank {rank}: ' if rank else ''}{condense(message, keys)}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def condense(message: str, keys: Iterable[str] = ()) -> str:
    """One line out of a parser's many: the full key, what is wrong, and a close match for a mistyped name.

    ``keys`` are the options at the top level; those of a class are read off its constructor.
    """
    key, cls, said = _heart(message)
    if said.startswith("unrecognized arguments: --"):
        return _no_option("", re.findall(r"--([\w.]+)", said), "", list(keys))
    if option := re.search(r"^Option '([\w.]+)' is not accepted", said):
        name = option[1].partition(".")[0] if cls else option[1]  # of nett.init_args.width, nett is what is wrong
        return _no_option(key, [name], cls, arguments(cls) if cls else list(keys))
    if option := re.search(r"^Group '([\w.]+)' does not accept option '([\w.]+)'", said):
        return _no_option("", [join_keys(key, *option.groups())], "", list(keys))
    if required := re.search(r"^the following arguments are required: (.*)", said):
        return f"{', '.join(join_keys(key, name) for name in required[1].split(', '))}: required, and not given"
    if name := re.search(
        r"^Expected a dot import path string: (\w[\w.]*\b)|^module '\S+' has no attribute '(\w+)'", said
    ):
        said = _no_class(name[1] or name[2])
    return f"{key}: {said}" if key else said


def _no_option(key: str, names: list[str], cls: str, known: list[str]) -> str:
    if names[0] in known:
        return f"{join_keys(key, names[0])}: cannot be set; whatever builds {cls} passes it"
    near = difflib.get_close_matches(names[0], known, n=1, cutoff=CLOSE)
    listing = f"--{key}.help {cls}" if cls else "--help"
    hint = f"did you mean {join_keys(key, near[0])}?" if near else f"{listing} lists them"
    return f"{', '.join(join_keys(key, name) for name in names)}: no such option; {hint}"


def _no_class(name: str) -> str:
    near = difflib.get_close_matches(name, fmlit.PUBLIC, n=1, cutoff=CLOSE)
    hint = f"did you mean fmlit.{near[0]}?" if near else "give its full path, as in fmlit.UNet"
    return f"there is no class {name}; {hint}"


class _Leaf(NamedTuple):
    """A line of a parser's message, with what it is nested in."""

    depth: int
    key: str
    cls: str
    said: str


def _heart(message: str) -> tuple[str, str, str]:
    """Key, class path and text of the lines nested deepest: of a union's types, the one that went furthest."""
    leaves = list(_leaves(message))
    if not leaves:
        return "", "", _readable(message)
    first = max(leaves, key=lambda leaf: leaf.depth)
    said = dict.fromkeys(leaf.said for leaf in leaves if (leaf.depth, leaf.key) == (first.depth, first.key))
    said = {text: None for text in said if not text.startswith("Expected a <")} or said  # there is something better
    given = re.search(r"^ *Given value: ([^(){}\n]{1,60})$", message, re.MULTILINE)
    text = "; ".join(said).rstrip(".")
    value = f". Got value: {given[1]}" if given and "Got value" not in text else ""
    return first.key, first.cls, _readable(text + value)


def _leaves(message: str) -> Iterator[_Leaf]:
    nested: list[tuple[int, str, str]] = []  # indentation, and a key or a class path
    for line in message.splitlines():
        if not line.strip():
            continue
        indentation = len(line) - len(re.sub(r"^ *(- )?", "", line))
        said = re.sub(r"^Type .* expects a function or a callable class: ", "", line[indentation:])
        while nested and nested[-1][0] >= indentation:
            nested.pop()
        if found := re.match(r'Parser key "([^"]+)":?\s*(.*)', said):
            nested.append((indentation, found[1], ""))
            said = found[2]
        elif found := re.match(r"Problem with given class_path '([\w.]+)':$", said):
            nested.append((indentation, "", found[1]))
            said = ""
        if said and not _NOISE.match(said):
            value = re.search(r"\.? Got value: Namespace\((?:class_path='([\w.]+)')?.*", said)
            cls = value[1] if value and value[1] else next((cls for *_, cls in reversed(nested) if cls), "")
            said = said[: value.start()] if value else said
            yield _Leaf(len(nested), join_keys(*(key for _, key, _ in nested)), cls, said)


def _readable(text: str) -> str:
    """Types as people write them, on one line."""
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", " ".join(text.split()))
    text = text.replace("Expected a typing.Literal", "Expected one of ")
    return re.sub(r"(?i)Expected a (?=[aeiou])", "Expected an ", text)


def join_keys(*keys: str) -> str:
    """``model.net.channels``, the way it is written on the command line."""
    return ".".join(part for key in keys for part in key.split(".") if part and part != "init_args")


def arguments(cls: type | str) -> list[str]:
    """The names of a class's constructor arguments, inherited ones included where it passes them on."""
    cls = pydoc.locate(cls) if isinstance(cls, str) else cls  # type: ignore[assignment]
    names: dict[str, None] = {}
    for base in inspect.getmro(cls) if isinstance(cls, type) else ():
        parameters = inspect.signature(base).parameters.values()
        named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        names |= dict.fromkeys(named)
        if len(named) == len(parameters):
            break
    return list(names)


def blame(error: BaseException, config: Mapping[str, Any], parts: Mapping[str, type]) -> str:
    """The error's message, headed by the key of the object in whose constructor it was raised, if it was in one.

    Args:
        error: as it was caught; where a parser has wrapped it, the one inside counts.
        config: the parsed configuration, nested dicts.
        parts: top-level keys that hold the arguments of a fixed class.
    """
    objects = [_Object(key, cls, config.get(key) or {}) for key, cls in parts.items()]
    objects += _configured(config)
    raised: BaseException | None = error
    while raised is not None:
        for frame, _ in reversed(list(traceback.walk_tb(raised.__traceback__))):
            built = frame.f_locals.get("self") if frame.f_code.co_name in ("__init__", "__post_init__") else None
            for key, cls, init_args in objects:
                if type(built) is cls and _holds({**vars(built), **frame.f_locals}, init_args):
                    return _headed(f"{raised}", key, arguments(cls))
        raised = raised.__cause__ or raised.__context__
    return f"{error}" or type(error).__name__


def _headed(message: str, key: str, names: Iterable[str]) -> str:
    """``data.batch_size must be ...``, ``data: MNIST has no ...``."""
    first = re.match(r"\w*", message)
    if message.startswith(f"{key}."):
        return message
    return f"{key}.{message}" if first and first[0] in names else f"{key}: {message}"


class _Object(NamedTuple):
    key: str
    cls: Any
    init_args: Mapping[str, Any]


def _configured(config: Any, key: str = "") -> Iterator[_Object]:
    """Every object that a configuration names by its class path."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _configured(value, join_keys(key, name))
        if isinstance(config.get("class_path"), str):
            yield _Object(key, pydoc.locate(config["class_path"]), config.get("init_args") or {})
    elif isinstance(config, list):
        for item in config:
            yield from _configured(item, key)


def _holds(values: Mapping[str, Any], init_args: Mapping[str, Any]) -> bool:
    """Whether these are the values of an object with such arguments: tells two objects of one class apart."""
    plain = {name: value for name, value in init_args.items() if isinstance(value, (str, int, float))}
    return all(values.get(name, value) == value for name, value in plain.items())
