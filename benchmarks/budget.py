"""What a sampler costs: evaluations of the network, and the steps that a number of them pays for."""

from collections.abc import Callable

from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.grids import Grid
from fmlit.sampling.samplers import Sampler
from fmlit.solvers.records import SOLVERS


def affordable_steps(make: Callable[[int, Grid], Sampler], model: GenerativeModel, nfe: int, grid: Grid) -> int | None:
    """The most steps that take at most ``nfe`` evaluations of the network, the closing denoising step included.

    Args:
        make: builds the sampler of so many steps on a grid.
        model: what is sampled; its path and prediction decide whether there is a closing step.
        nfe: the number of evaluations per sample.
        grid: where the steps lie.

    Returns:
        The number of steps, or None where not even one can be paid for.
    """
    probe = make(2, grid)
    per_step = SOLVERS[probe.method].evaluations
    if per_step is None:
        raise ValueError(f"{probe.method} chooses its own steps")
    closing = bool(grid.times(model.path, 2, probe.limits(model))[-1] < 1)
    steps = (nfe - 1) // per_step + 1 if closing else nfe // per_step
    return steps if steps >= (2 if closing else 1) else None
