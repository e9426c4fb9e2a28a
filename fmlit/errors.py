"""Errors for people: one line that names the key, file or value and the way out, and exit code 2."""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator

# What users can cause: values, files, and what libraries say of either. All else is a bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError, TypeError, ImportError)
_NOISE = re.compile(
    r"^(Subtypes:|Errors:|Given value|Does not validate|Problem with given class_path|Type .* expects a function)"
    r"|^Expected a <class 'NoneType'>|^$"
)


@contextlib.contextmanager
def one_line_errors(keys: Iterable[str] = ()) -> Iterator[None]:
    """End the program with exit code 2 and one line on stderr where a user's mistake raises.

    ``FMLIT_DEBUG=1`` shows the traceback instead. ``keys`` are the known options, of which a close one is suggested.
    """
    try:
        yield
    except USER_ERRORS as error:
        if os.environ.get("FMLIT_DEBUG"):
            raise
        exit_with(f"{error}" or type(error).__name__, keys)


def exit_with(message: str, keys: Iterable[str] = ()) -> None:
    """Print the condensed message and exit with code 2."""
    print(f"error: {condense(message, keys)}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def condense(message: str, keys: Iterable[str] = ()) -> str:
    """One line out of a parser's many: the full key, what is wrong, and a close match for an unknown key."""
    path = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    text = re.sub(r"Type collections\.abc\.Callable\[.*?\] expects a function or a callable class: ", "", message)
    text = re.sub(r'Parser key "[^"]+":?', "\n", text)
    text = re.sub(r"\.? Got value: Namespace\(.*", "", text)
    leaves = [line.strip().removeprefix("- ").strip() for line in text.splitlines()]
    leaves = list(dict.fromkeys(leaf for leaf in leaves if not _NOISE.search(leaf)))
    said = " ".join("; ".join(leaves).split()) or " ".join(message.split())
    said = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", said).replace("typing.Literal", "one of ")
    said = said.replace("Expected a dot import path string:", "no class of this name:")
    for unknown in re.findall(r"(?:unrecognized arguments: --|Option ')([\w.]+)", message):
        near = difflib.get_close_matches(unknown, list(keys), n=1)
        said += f"; did you mean {near[0]}?" if near else ""
    return f"{path}: {said}" if path else said
