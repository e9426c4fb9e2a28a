"""The sampler of a solver, by the solver's name."""

from collections.abc import Mapping
from typing import Any

from fmlit.core.errors import UserError
from fmlit.flows.diffusions import ConstantDiffusion, Diffusion
from fmlit.sampling.grids import Grid
from fmlit.sampling.guidance import WHOLE_CLOCK, Interval
from fmlit.sampling.samplers import ChurnSampler, ODESampler, Precision, Sampler, SDESampler, SolverName
from fmlit.solvers.records import SOLVERS, Option, solver_names


def build_sampler(
    solver: SolverName,
    steps: int | None = None,
    grid: Grid | None = None,
    guidance: float = 1.0,
    sigma: Diffusion | float | None = None,
    precision: Precision = "float32",
    guidance_interval: Interval = WHOLE_CLOCK,
    options: Mapping[str, Option] | None = None,
) -> Sampler:
    """The sampler of a solver by name: an ``ODESampler``, an ``SDESampler`` or a ``ChurnSampler``.

    Args:
        solver: any of the names in ``fmlit.solvers.SOLVERS``.
        steps: the number of steps. None means the default of the sampler.
        grid: where the steps lie. None means the default of the sampler.
        guidance: the guidance scale, as for ``ODESampler``.
        precision: the arithmetic of the network, as for ``ODESampler``.
        guidance_interval: the range of t in which guidance acts, as for ``ODESampler``.
        sigma: the diffusion coefficient, of SDE solvers only. A number stands for a constant.
        options: options of the solver, such as ``{"order": 3}`` for unipc; docs/solvers.md lists them.

    Raises:
        UserError: an unknown solver; sigma or an option that the solver does not have; a value that it refuses.
    """
    if solver not in SOLVERS:
        raise UserError(f"unknown solver {solver!r}: choose from {', '.join(SOLVERS)}")
    kind, options = SOLVERS[solver].kind, dict(options or {})
    if sigma is not None and kind != "SDE":
        choice = ", ".join(solver_names("SDE"))
        raise UserError(f"sigma is the noise of an SDE, and {solver} takes none: choose from {choice}")
    SOLVERS[solver].check_options(options)
    diffusion = ConstantDiffusion(sigma) if isinstance(sigma, int | float) else sigma
    values = {"steps": steps, "grid": grid, "sigma": diffusion}
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    given |= {"guidance": guidance, "guidance_interval": guidance_interval, "precision": precision}
    if kind == "churn":
        return ChurnSampler(**given | options)
    if kind == "SDE":
        return SDESampler(method=solver, **given)
    return ODESampler(method=solver, options=options, **given)
