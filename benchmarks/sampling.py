"""Sampling speed: solvers at equal numbers of evaluations of the network."""

from collections.abc import Sequence
from functools import partial

from benchmarks.budget import affordable_steps
from benchmarks.outcome import Outcome, Report
from benchmarks.rounds import now, rates, run_rounds
from benchmarks.training import built
from benchmarks.workload import Setup
from fmlit.core.errors import UserError
from fmlit.core.randomness import image_seeds
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.build import build_sampler
from fmlit.sampling.generate import balanced_labels
from fmlit.sampling.grids import UniformGrid
from fmlit.sampling.samplers import Precision, Sampler
from fmlit.solvers.records import SOLVERS as RECORDS

SOLVERS = [name for name, record in RECORDS.items() if record.evaluations is not None]


def sampling(
    setup: Setup, solvers: Sequence[str] | None, evaluations: Sequence[int], rounds: int, report: Report
) -> Outcome:
    """Images/s of every solver at the most steps that these numbers of evaluations pay for, on a uniform grid.

    The network has its initial weights: with a fixed number of steps, the time does not depend on them.

    Raises:
        ValueError: there is no such solver, it chooses its own steps, or none can be paid for.
    """
    for name in solvers or ():
        if name not in SOLVERS:
            raise UserError(f"solvers: {name} is none of {', '.join(SOLVERS)}, which take a fixed number of steps")
    with built(setup, steps=1) as cli:
        module, size = cli.model, cli.datamodule.batch_size
    model = module.model.to(setup.device).eval()
    module.execution.compile_net(model.net)
    precision: Precision = "bfloat16" if setup.precision == "bf16-mixed" else "float32"
    samplers = {
        f"{name} at {nfe}": build_sampler(name, steps, UniformGrid(), precision=precision)
        for nfe in evaluations
        for name in solvers or SOLVERS
        if (steps := affordable_steps(partial(build_sampler, name), model, nfe, UniformGrid()))
    }
    if not samplers:
        raise UserError(f"evaluations: {', '.join(map(str, evaluations))} pay for no step of these solvers")
    counts = {name: count_evaluations(sampler, model, size) for name, sampler in samplers.items()}
    blocks = {name: partial(timed_batch, sampler, model, size) for name, sampler in samplers.items()}
    done = run_rounds(blocks, rounds, report.round)
    results = rates(done, dict.fromkeys(blocks, size))
    for name, count in counts.items():
        results[name]["evaluations"] = count
    details = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "shape": list(model.shape),
        "batch_size": size,
        "precision": precision,
        "compile": module.execution.compile,
        "channels_last": module.execution.channels_last,
        "steps": {name: sampler.steps for name, sampler in samplers.items()},
    }
    return Outcome(results, done, details)


def timed_batch(sampler: Sampler, model: GenerativeModel, size: int) -> float:
    """Seconds for a batch of this size, with balanced labels where there are classes."""
    seeds = image_seeds(0, range(size))
    labels = balanced_labels(model, range(size))
    started = now(model.device)
    sampler.sample(model, seeds, labels)
    return now(model.device) - started


def count_evaluations(sampler: Sampler, model: GenerativeModel, size: int) -> int:
    """How often a batch asks the network; the first use of its kernels, or their compilation, falls in here too."""
    counted = 0

    def count(*_: object) -> None:
        nonlocal counted
        counted += 1

    hook = model.register_forward_hook(count)  # not of the network, where it would be compiled
    try:
        timed_batch(sampler, model, size)
    finally:
        hook.remove()
    return counted
