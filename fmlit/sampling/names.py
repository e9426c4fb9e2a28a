"""The names of samplers in protocols, such as ``fid_50k-...-heun18``: whatever changes the samples changes the name.

A name holds the method, the steps, and what differs from the sampler's defaults:

* ``heun18``, and ``dopri5``, which chooses its own steps;
* ``midpoint10+uniform`` for a grid, ``eulermaruyama250+reverse`` for a diffusion coefficient;
* ``unipc10+order3`` for an option of the solver, ``heun18+bfloat16`` for the network's arithmetic;
* ``unipc10+cfg1.5`` for classifier-free guidance, ``unipc10+auto1.5`` for autoguidance, and
  ``unipc10+cfg1.5_0.2to0.8`` where it acts in an interval of t only.
"""

import re
from dataclasses import fields, is_dataclass
from inspect import signature
from typing import Any, Protocol

from fmlit.sampling.guidance import WHOLE_CLOCK, Interval
from fmlit.solvers.records import SOLVERS


class Settings(Protocol):
    """The settings that every sampler has."""

    method: str
    steps: int
    guidance: float
    guidance_interval: Interval


def sampler_name(sampler: Settings, guided: bool = False) -> str:
    """The name of a sampler, with or without a guide."""
    record = SOLVERS.get(sampler.method)  # none of a method that somebody else wrote
    steps = "" if record is not None and record.evaluations is None else sampler.steps
    parts = [f"{sampler.method.replace('_', '')}{steps}"]
    for key, parameter in signature(type(sampler)).parameters.items():
        value = getattr(sampler, key, parameter.default)
        if key == "options":
            defaults = record.options if record else {}
            parts += [_label(name, option) for name, option in sorted(value.items()) if option != defaults.get(name)]
        elif key not in ("method", "steps", "guidance", "guidance_interval") and value != parameter.default:
            parts.append(_label(key, value))
    if sampler.guidance != 1:
        start, end = sampler.guidance_interval
        where = "" if (start, end) == WHOLE_CLOCK else f"_{_number(start)}to{_number(end)}"
        parts.append(f"{'auto' if guided else 'cfg'}{_number(sampler.guidance)}{where}")
    return re.sub(r"[^A-Za-z0-9_.+]", "_", "+".join(parts))  # the letters that protocols take


def _number(value: float) -> str:
    """``5``, ``0.5``, ``1e-05``: six digits, or as many as tell the number from its neighbors."""
    return short if float(short := f"{value:g}") == value else repr(value)


def _label(key: str, value: Any) -> str:
    """A number after its key, a switch as its key, and a grid or diffusion by its class and non-default arguments."""
    if value is True:
        return key
    if isinstance(value, int | float):
        return f"{key}{_number(value)}"
    if isinstance(value, str):
        return value
    kind = type(value).__name__.removesuffix("Grid").removesuffix("Diffusion").lower()
    changed = [f.name for f in fields(value) if getattr(value, f.name) != f.default] if is_dataclass(value) else []
    return "_".join([kind, *(_label(name, getattr(value, name)) for name in changed)])
