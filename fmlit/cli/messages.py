"""What a parser says, on one line that starts with the full key and proposes what may have been meant.

A parser of jsonargparse builds a nested parser for each class that is configured. A nested parser knows its keys only
from there on. So it marks the start of each key, and the outer parser writes its own key there.
"""

import difflib
import pydoc
import re
from collections.abc import Callable, Iterable

import fmlit

KEY, END = "\0", "\1"  # the start of a key, and the end of a nested parser's line; neither occurs in an option
CLOSE = 0.75  # similarity of names above which one may have been meant for the other
ALIASES = {"lr": "learning_rate", "epochs": "images", "max_epochs": "images", "workers": "num_workers"}

# What jsonargparse says around the one thing that matters.
_NOISE = re.compile(
    r"Subtypes:|Errors:|Given value|Does not validate|Expected a path but|Expected a <class 'NoneType'>$"
)
_CALLABLE = r"Type \S.* expects a function or a callable class: "


def join_keys(*keys: str) -> str:
    """``model.net.channels``, the way it is written on the command line."""
    return ".".join(part for key in keys for part in key.split(".") if part and part != "init_args")


def public_name(cls: Callable[..., object] | str) -> str:
    """The name by which recipes call a class: ``fmlit.UNet``."""
    module, _, name = cls.rpartition(".") if isinstance(cls, str) else (cls.__module__, "", cls.__qualname__)
    return f"fmlit.{name}" if fmlit.PUBLIC.get(name) == module else f"{module}.{name}"


def one_line(message: str, options: Iterable[str], cls: Callable[..., object] | None, passed: Iterable[str]) -> str:
    """A parser's message on one line, with its keys marked.

    Args:
        message: what jsonargparse says, on many lines.
        options: the names that this parser knows.
        cls: the class whose arguments it reads; None for the parser of the whole command line.
        passed: arguments of that class that cannot be set, as whatever builds it passes them.
    """
    key, said = "", message
    while heading := re.match(r'\s*Parser key "([^"]+)"(?: element \d+)?:\s*', said):
        key, said = join_keys(heading[1]), said[heading.end() :]
    if nested := re.search(f"{KEY}[^{END}]*{END}", said):
        return nested[0].replace(KEY, f"{KEY}{key}.") if key else nested[0]
    if names := re.search(r"^unrecognized arguments: (--.*)", said):
        wrong = re.findall(r"--([\w.]+)", names[1])
    elif bare := re.search(r"^unrecognized arguments: ([a-z][\w.]*=\S*)", said):
        return f"{bare[1]}: an option begins with two dashes: --{bare[1]}{END}"
    elif option := re.search(r"^Option '([\w.]+)' is not accepted", said):
        wrong = [option[1].partition(".")[0] if cls else option[1]]  # of nett.init_args.width, nett is what is wrong
    elif option := re.search(r"^Group '([\w.]+)' does not accept option '([\w.]+)'", said):
        wrong = [join_keys(*option.groups())]
    elif required := re.search(r"^the following arguments are required: (.*)", said):
        return f"{', '.join(KEY + name for name in required[1].split(', '))}: required, and not given{END}"
    else:
        said = _reason(said)
        return f"{KEY}{key}: {said}{END}" if key else said
    return _no_option([join_keys(name) for name in wrong], list(options), cls, passed) + END


def _no_option(names: list[str], options: list[str], cls: Callable[..., object] | None, passed: Iterable[str]) -> str:
    if cls is not None and names[0] in passed:
        return f"{KEY}{names[0]}: cannot be set; whatever builds {public_name(cls)} passes it"
    alias = ALIASES.get(names[0].rpartition(".")[2], "")
    near = [alias] if alias in options else difflib.get_close_matches(names[0], options, n=1, cutoff=CLOSE)
    listing = f"--{KEY}help {public_name(cls)}" if cls else "--help"
    hint = f"did you mean {KEY}{near[0]}?" if near else f"{listing} lists them"
    return f"{', '.join(KEY + name for name in names)}: no such option; {hint}"


def finish(line: str, keys: Callable[[], Iterable[str]]) -> str:
    """The line without its marks, and with a key of another level where no option of the same level is close.

    Args:
        line: as it comes from ``one_line``.
        keys: all keys of the command line.
    """
    line = line.replace(KEY, "").replace(END, "")
    unknown = re.match(r"([\w.]+): no such option; (?=--)", line)
    near = _key_elsewhere(unknown[1], list(keys())) if unknown else None
    return f"{unknown[0]}did you mean {near}?" if unknown and near else line


def _key_elsewhere(key: str, keys: list[str]) -> str | None:
    """The key with that last part, or its alias: first below the same parent, then the one that is nested least."""
    parent, _, name = key.rpartition(".")
    ends = {k: k.rpartition(".")[2] for k in keys}
    wanted = [ALIASES.get(name, name), *difflib.get_close_matches(name, set(ends.values()), n=1, cutoff=CLOSE)]
    fitting = [k for end in wanted for k in keys if ends[k] == end]
    fitting.sort(key=lambda k: (wanted.index(ends[k]), not k.startswith(f"{parent}."), k.count(".")))
    return fitting[0] if fitting else None


def _reason(said: str) -> str:
    """What is wrong with a value, of all that the types of a union say about it."""
    texts = (re.sub(rf"^\s*(- )?({_CALLABLE})?", "", line).rstrip(".") for line in said.splitlines())
    reasons = dict.fromkeys(text for text in texts if text and not _NOISE.match(text))
    better = [text for text in reasons if not text.startswith("Expected a <")]
    text = "; ".join(better or reasons)
    if unknown := re.match(
        r"Expected a dot import path string: (\w[\w.]*\b)|module '\S+' has no attribute '(\w+)'", text
    ):
        return _no_class(unknown[1] or unknown[2])
    given = re.search(r"^ *Given value: ([^(){}\n]{1,60})$", said, re.MULTILINE)
    abstract = re.search(r"but ([\w.]+) is abstract", text) or ("but is abstract" in text and given)
    if abstract and (missing := sorted(getattr(pydoc.locate(abstract[1].strip()), "__abstractmethods__", ()))):
        return f"{abstract[1]} is abstract: it lacks {', '.join(missing)}"
    return _readable(f"{text}. Got value: {given[1]}" if given and "Got value" not in text else text)


def _no_class(name: str) -> str:
    """Proposes the public class of a similar name, or one whose name starts or ends like it: VP, wandb."""
    names = {public.casefold(): public for public in fmlit.PUBLIC}
    short = name.rpartition(".")[2].casefold()
    near = difflib.get_close_matches(short, names, n=1, cutoff=CLOSE)
    near += [other for other in names if len(short) > 1 and other.startswith(short)]
    hint = f"did you mean fmlit.{names[near[0]]}?" if near else "give its full path, as in fmlit.UNet"
    return f"there is no class {name}; {hint}"


def _readable(text: str) -> str:
    """Types as people write them, on one line."""
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", " ".join(text.split()))
    text = text.replace("Expected a typing.Literal", "Expected one of ")
    return re.sub(r"(?i)Expected a (?=[aeiou])", "Expected an ", text)


def class_path(message: str) -> str | None:
    """The class that jsonargparse has looked for, where a message is about one."""
    path = re.search(
        rf"Problem with given class_path '([\w.]+)':|{_CALLABLE}.*Got value: ([\w.]+)$"
        r"|Expected a path but ([\w.]+) either|Subtypes: .*<class '\w+\.(?:.|\n)*Given value: ([\w.]+)$",
        message,
        re.MULTILINE,
    )
    return next(filter(None, path.groups())) if path else None


def headed(message: str, key: str, arguments: Iterable[str]) -> str:
    """A constructor's message with the key of its object: ``data.batch_size must be``, ``data: there is no``."""
    if not key or message.startswith((f"{key}.", f"{key}:")):
        return message
    first = re.match(r"\w*", message)
    return f"{key}.{message}" if first and first[0] in arguments else f"{key}: {message}"
