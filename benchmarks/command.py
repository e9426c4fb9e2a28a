"""``scripts/benchmark.py``: what to measure, options, the table, benchmark.json."""

import json as json_format
from collections.abc import Mapping
from typing import Any, Literal

import torch

from benchmarks.contenders import PEERS, check_peers
from benchmarks.machine import hardware, versions
from benchmarks.outcome import Outcome, Report
from benchmarks.workload import Setup, recipe
from fmlit.cli.options import Integers, Names, choose_device
from fmlit.core.errors import UserError
from fmlit.core.files import new_file
from fmlit.metrics import Features
from fmlit.models.compilation import CompileMode

What = Literal["training", "sampling", "startup", "data", "fid", "ranks"]

# Options that only some measurements take, with their defaults there.
SOME: dict[str, tuple[tuple[What, ...], Any]] = {
    "batch_size": (("training", "sampling", "data", "ranks", "fid"), None),
    "threads": (("training", "sampling", "startup", "data", "fid"), None),
    "steps": (("training", "data", "ranks"), 20),
    "lead": (("training", "data", "ranks"), 3),
    "peers": (("training", "data"), Names(PEERS)),
    "precision": (("training", "sampling"), None),
    "compile": (("training", "sampling"), None),
    "channels_last": (("training", "sampling"), None),
    "memory": (("training",), "on"),
    "solvers": (("sampling",), None),
    "evaluations": (("sampling",), Integers((10, 20, 35))),
    "images": (("fid",), 1000),
    "features": (("fid",), None),
}


def benchmark(
    what: What = "training",
    net: str = "small",
    rounds: int = 5,
    steps: int | None = None,
    lead: int | None = None,
    batch_size: int | None = None,
    peers: Names | None = None,
    precision: Literal["32-true", "bf16-mixed"] | None = None,
    compile: CompileMode | None = None,
    channels_last: bool | None = None,
    memory: Literal["on", "off"] | None = None,
    solvers: Names | None = None,
    evaluations: Integers | None = None,
    images: int | None = None,
    features: Features | None = None,
    threads: int | None = None,
    device: str = "auto",
    out: str = "benchmark.json",
    json: bool = False,
) -> dict[str, Any]:
    """Measure speed: contenders take turns, round after round, in one run on one machine.

    Prints a table of medians with the lowest and the highest of all rounds, and writes benchmark.json with every time
    that was taken, the versions, the machine and its load. The last line of output is JSON.

    Args:
        what: training: fmlit through its Trainer, a bare loop, and other packages. sampling: solvers at equal cost.
            startup: train.py from its start to its first step. data: loaders alone. fid: features and distance.
            ranks: two processes against one at the same batch.
        net: cifar10 (35.7 million parameters, 32x32), small (the quickstart's, 8x8), or the YAML file of a recipe.
        rounds: Turns of every contender.
        steps: Steps in a timed block (20).
        lead: Steps before each, not timed (3).
        batch_size: Images per step, or per batch of samples or features; by default the recipe's.
        peers: Any of torchcfm, flow_matching, diffusers; none for fmlit and the bare loop alone. Default: all.
        precision: By default what train.py chooses: bf16-mixed on a GPU that has it, else 32-true. Of sampling 32-true.
        compile: Mode of torch.compile for the network, of fmlit and of loops with its settings. Default: the recipe's.
        channels_last: Keep kernels and activations in that format; by default as the recipe says.
        memory: Whether to measure peak memory too, each contender in a process of its own. Default: on.
        solvers: Solvers by name; by default all that take a fixed number of steps.
        evaluations: Of the network, at most, per sample (10,20,35).
        images: Images whose features are taken in a block (1000).
        features: By default Inception's, of FID.
        threads: Of PyTorch on the CPU; by default its own choice. In ranks there are two in all.
        device: auto, cpu, cuda, cuda:1, ...
        out: The file that benchmark.json is written to; one of the same name is replaced.
        json: No table, and the last line is the whole of benchmark.json.
    """
    chosen = choose_device(device)
    given: dict[str, Any] = {
        "batch_size": batch_size,
        "steps": steps,
        "lead": lead,
        "peers": peers,
        "precision": precision,
        "compile": compile,
        "channels_last": channels_last,
    }
    given |= {"memory": memory, "solvers": solvers, "evaluations": evaluations, "images": images, "features": features}
    options = _options(what, {**given, "threads": threads}, rounds)
    file = new_file(out, ".json")
    if threads is not None:
        torch.set_num_threads(threads)
    setup = Setup(recipe(net), str(chosen), batch_size, precision, threads, compile, channels_last)
    outcome = _measure(what, setup, options, Report(rounds))
    record = {
        "what": what,
        "net": net,
        "device": str(chosen),
        "versions": versions(),
        "hardware": hardware(chosen),
        "details": outcome.details,
        "results": outcome.results,
        "missing": outcome.missing,
        "rounds": [done.record() for done in outcome.rounds],
    }
    file.write_text(json_format.dumps(record, indent=1) + "\n", encoding="utf-8")
    if json:
        return record
    print(outcome.table())
    return {"what": what, "net": net, "out": out, "results": outcome.medians(), "missing": outcome.missing}


def _options(what: What, given: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """The options of this measurement, with its defaults.

    Raises:
        ValueError: one is given that it does not take, or is too small.
    """
    options: dict[str, Any] = {"rounds": rounds}
    for name, (takers, default) in SOME.items():
        if what in takers:
            options[name] = default if given[name] is None else given[name]
        elif given[name] is not None:
            raise UserError(f"{name} is an option of --what {' and '.join(takers)}, not of {what}")
    for name in ("rounds", "steps", "lead", "batch_size", "images", "threads"):
        if options.get(name) is not None and options[name] < 1:
            raise UserError(f"{name} must be at least 1, got {options[name]}")
    if "peers" in options:
        options["peers"] = check_peers(options["peers"])
    return options


def _measure(what: What, setup: Setup, options: dict[str, Any], report: Report) -> Outcome:
    # The rest is part of the setup. Imported by what is asked for: each brings libraries that the others do without.
    of_setup = ("batch_size", "precision", "threads", "compile", "channels_last")
    options = {name: value for name, value in options.items() if name not in of_setup}
    if what == "training":
        from benchmarks.training import training

        return training(setup, **options, report=report)
    if what == "sampling":
        from benchmarks.sampling import sampling

        return sampling(setup, **options, report=report)
    if what == "startup":
        from benchmarks.startup import startup

        return startup(setup, **options, report=report)
    if what == "data":
        from benchmarks.loading import loading

        return loading(setup, **options, report=report)
    if what == "fid":
        from benchmarks.fid import fid

        return fid(setup, **options, report=report)
    from benchmarks.ranks import ranks

    return ranks(setup, **options, report=report)
