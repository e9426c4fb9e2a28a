"""Which solver is best at a given cost: errors of all of them against an accurate reference, as a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.budget import affordable_steps
from fmlit import solvers
from fmlit.core.errors import UserError
from fmlit.core.randomness import image_noise, image_seeds
from fmlit.core.tensors import expand_time
from fmlit.flows.predictions import Velocity
from fmlit.flows.times import sampling_limits
from fmlit.models.generative_model import GenerativeModel, evaluation_mode
from fmlit.sampling.build import build_sampler
from fmlit.sampling.generate import balanced_labels
from fmlit.sampling.grids import EDMGrid, Grid, LogitSNRGrid, UniformGrid
from fmlit.sampling.guidance import guided_velocity
from fmlit.sampling.samplers import ODESampler, Sampler
from fmlit.solvers.records import SOLVERS, Option, solver_names

NFES = (5, 10, 20, 50)
GRIDS: dict[str, Grid] = {"E": EDMGrid(), "L": LogitSNRGrid(), "U": UniformGrid()}
VARIANTS: dict[str, tuple[str, dict[str, Option]]] = {
    "dpmpp_3m, corrected": ("dpmpp_3m", {"corrected": True}),
    "ipndm, variable step": ("ipndm", {"variable_step": True}),
}


Make = Callable[[int, Grid], Sampler]


def all_solvers() -> dict[str, Make]:
    """Every solver by its name, as a sampler of some steps on some grid; dopri5, which chooses its steps, left out."""
    made: dict[str, Make] = {}
    for name in solver_names("ODE", "exponential"):
        if SOLVERS[name].evaluations is not None:
            made[name] = partial(build_sampler, name)
    made |= {title: partial(build_sampler, name, options=options) for title, (name, options) in VARIANTS.items()}
    return made | {f"{name} (SDE)": partial(build_sampler, name) for name in solver_names("SDE", "churn")}


@torch.no_grad()
def reference_samples(
    model: GenerativeModel, seeds: Tensor, labels: Tensor | None = None, tolerance: float = 1e-6
) -> Tensor:
    """What an exact ODE sampler returns for these seeds: by dopri5, on as much of the clock as is regular.

    In float32, the precision of the solvers: a network in float64 takes ten times as long, and moves what comes out by
    2e-4 where the network is the digits' U-Net.
    """
    limits = sampling_limits(model.path, model.prediction)
    times = torch.tensor(limits, dtype=torch.float64)
    velocity = guided_velocity(model, labels, 1.0)
    with evaluation_mode(model):
        noise = image_noise(seeds, model.shape).to(model.device)
        start = times[0].to(noise).expand(len(seeds))
        x = solvers.dopri5(
            velocity, expand_time(model.path.beta(start), noise) * noise, times, rtol=tolerance, atol=tolerance
        )
        if limits.end < 1:
            end = times[-1].to(noise).expand(len(seeds))
            x = Velocity().data(model.path, velocity(x, end), x, end)
    return x


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of two point sets (n, *shape) of equal size, in the units of the data.

    The root of the mean, over random directions, of the squared 2-Wasserstein distance of the projections (Bonneel et
    al. 2015). A shift by v has the distance |v| / sqrt(d).
    """
    if a.shape != b.shape:
        raise UserError(
            f"sliced_wasserstein compares point sets of one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    a, b = a.double().flatten(1).cpu(), b.double().flatten(1).cpu()
    directions = torch.randn(a.shape[1], projections, dtype=a.dtype, generator=torch.Generator().manual_seed(seed))
    directions = directions / directions.norm(dim=0)
    difference = (a @ directions).sort(dim=0).values - (b @ directions).sort(dim=0).values
    return difference.square().mean().sqrt().item()


class Best(NamedTuple):
    """The smallest error of a solver at some cost, and the letter of the grid that it was reached on."""

    error: float
    grid: str


@dataclass(frozen=True)
class ErrorTable:
    """Errors of solvers (rows) by the number of evaluations; None where not even one step is affordable."""

    title: str
    samples: int
    rows: Mapping[str, Mapping[int, Best | None]]
    noise: float  # the distance of two independent sets of exact samples

    def best(self) -> dict[int, str]:
        """The solver and the grid of the smallest error for each number of evaluations."""
        found: dict[int, tuple[Best, str]] = {}
        for name, row in self.rows.items():
            for nfe, best in row.items():
                if best is not None:
                    found[nfe] = min(found.get(nfe, (best, name)), (best, name))
        return {nfe: f"{name} {best.grid}" for nfe, (best, name) in found.items()}

    def markdown(self) -> str:
        """The table, the smallest error of each column in bold."""
        least, nfes = self.best(), list(next(iter(self.rows.values())))
        lines = [f"### {self.title}", ""]
        lines += ["| solver | " + " | ".join(f"{nfe} evaluations" for nfe in nfes) + " |", "|---|" + "---|" * len(nfes)]
        for name, row in self.rows.items():
            cells = []
            for nfe, best in row.items():
                text = "" if best is None else f"{best.error:.4f} {best.grid}"
                cells.append(f"**{text}**" if best and least[nfe] == f"{name} {best.grid}" else text)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += [
            "",
            f"These are {self.samples:,} samples. Two independent exact sets of this size are {self.noise:.4f} apart.",
        ]
        return "\n".join(lines)


def solver_list() -> str:
    """All solvers with their order, cost and options, as a Markdown table."""
    rows = ["| solver | kind | order | evaluations per step | options and their defaults |", "|---|---|---|---|---|"]
    for solver in SOLVERS.values():
        cost = "adaptive" if solver.evaluations is None else solver.evaluations
        defaults = {key: f"{value:g}" if type(value) is float else str(value) for key, value in solver.options.items()}
        options = ", ".join(f"`{key}` {default.lower()}" for key, default in defaults.items())
        rows.append(f"| `{solver.name}` | {solver.kind} | {solver.order} | {cost} | {options} |")
    return "\n".join(rows)


def introduction() -> str:
    """What the page says about the solvers and about how they are compared."""
    grids = ", ".join(f"{letter} = `{type(grid).__name__}`" for letter, grid in GRIDS.items())
    return f"""# Solvers

{solver_list()}

**Kinds.** An exponential solver works in the noise level beta / alpha, and uses z or eps of past steps.

**Orders** hold for the default options. With `corrected`, `dpmpp_3m` has order 3. With `variable_step`, `ipndm` has
order 4. The order of `unipc` is its `order` option plus 1. SDE solvers show their weak order, for a diffusion that does
not depend on x. `churn` has order 2 if it adds no noise.

You can set an option in three places:

* on the command line, for `fmlit sample` and `fmlit evaluate`: `--solver_options.order 3`
* in the sampler of a recipe: `options: {{order: 3}}`
* in Python: `options={{"order": 3}}`

## Solvers at equal cost

The tables show the error of each solver for a given number of evaluations of the field. The error is the sliced
2-Wasserstein distance to the samples of dopri5 at a tolerance of 1e-6, in the units of the data. Each solver takes as
many steps as the evaluations allow, including the closing denoising step. The smallest error of each column is bold.

* The letter names the best of three grids for each solver: {grids}.
* ODE solvers start from the same noise as the reference, so they can reach 0.
* SDE solvers (sigma_t = beta_t; churn with its defaults) draw their own noise. Apart from chance, they cannot get
  closer than two independent sets of samples are to each other.

`python scripts/figures.py --table FILE [--checkpoint RUN]` makes these tables."""


def page(tables: Sequence[ErrorTable]) -> str:
    """A Markdown page of all solvers and of the tables."""
    return "\n\n".join([introduction(), *(table.markdown() for table in tables)]) + "\n"


def error_table(
    model: GenerativeModel,
    title: str,
    n: int,
    nfes: Sequence[int] = NFES,
    grids: Mapping[str, Grid] = GRIDS,
    made: Mapping[str, Make] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> ErrorTable:
    """Sliced Wasserstein distance of n samples of every solver to the reference, on the best of the grids.

    ODE solvers start from the noise of the reference; SDE solvers, whose samples are independent of it, from other.
    ``report`` is told every row when it is done.
    """
    seeds = {stochastic: image_seeds(int(stochastic), range(n)) for stochastic in (False, True)}
    labels = balanced_labels(model, range(n))
    labels = None if labels is None else labels.to(model.device)
    reference = reference_samples(model, seeds[False], labels)
    other = ODESampler("rk4", 25, UniformGrid()).sample(model, seeds[True], labels)  # far more exact than it is near
    noise = sliced_wasserstein(other, reference)

    def best(make: Make, nfe: int) -> Best | None:
        found = []
        for letter, grid in grids.items():
            steps = affordable_steps(make, model, nfe, grid)
            if steps is not None:
                sampler = make(steps, grid)
                samples = sampler.sample(model, seeds[not isinstance(sampler, ODESampler)], labels)
                found.append(Best(sliced_wasserstein(samples, reference), letter))
        return min(found, key=lambda best: best.error, default=None)

    rows = {}
    for name, make in (all_solvers() if made is None else made).items():
        rows[name] = {nfe: best(make, nfe) for nfe in nfes}
        report(f"{title}: {name}")
    return ErrorTable(title, n, rows, noise)
