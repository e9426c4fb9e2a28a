"""What the program knows about each solver: samplers, the command line, docs and tests read it here.

To add a solver, write its function and add one record to ``SOLVERS``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Literal

from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.solvers.exponential import check_order, ddim, dpmpp_2m, dpmpp_3m, ipndm, unipc
from fmlit.solvers.ode import check_tolerances, dopri5, euler, heun, midpoint, rk4
from fmlit.solvers.sde import check_churn, churn, euler_maruyama, stochastic_heun

Kind = Literal["ODE", "exponential", "SDE", "churn"]
Option = bool | int | float


@dataclass(frozen=True)
class Solver:
    """One solver.

    Attributes:
        function: the solver itself; its name is the name of the solver.
        kind: an "ODE" solver takes (field, x0, times). An "exponential" solver takes the path as well, and works in the
            noise level beta / alpha. An "SDE" solver takes (drift, diffusion, x0, times) and noise. "churn" is
            exponential and takes noise.
        order: order of convergence with the default options; the weak order for additive noise of an SDE solver, and
            the order without added noise of churn.
        evaluations: evaluations of the field per step, or None where the solver chooses its own steps.
        check: raises a UserError for values of the options that the function would refuse.
    """

    function: Callable[..., Tensor]
    kind: Kind
    order: int
    evaluations: int | None
    check: Callable[..., None] | None = None

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def options(self) -> dict[str, Option]:
        """The solver's options with their defaults: the keyword-only arguments of its function."""
        parameters = signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is Parameter.KEYWORD_ONLY}

    def check_options(self, options: Mapping[str, Option]) -> None:
        """Raise a UserError unless the solver has all these options and can work with their values."""
        known = self.options
        for name, value in options.items():
            if name not in known:
                choice = f"choose from {', '.join(known)}" if known else "it takes no options"
                raise UserError(f"options: {self.name} has no option {name!r}: {choice}")
            kind = type(known[name])
            fits = isinstance(value, int | float) if kind is float else type(value) is kind
            if not fits or (kind is float and isinstance(value, bool)):
                raise UserError(f"options: {self.name} takes {name} as {kind.__name__}, got {value!r}")
        if self.check is not None:
            self.check(**(known | dict(options)))


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver(euler, "ODE", 1, 1),
        Solver(midpoint, "ODE", 2, 2),
        Solver(heun, "ODE", 2, 2),
        Solver(rk4, "ODE", 4, 4),
        Solver(dopri5, "ODE", 5, None, check_tolerances),
        Solver(ddim, "exponential", 1, 1),
        Solver(dpmpp_2m, "exponential", 2, 1),
        Solver(dpmpp_3m, "exponential", 2, 1),  # 3 with corrected=True
        Solver(unipc, "exponential", 3, 1, check_order),  # order + 1
        Solver(ipndm, "exponential", 2, 1),  # 4 with variable_step=True
        Solver(euler_maruyama, "SDE", 1, 1),
        Solver(stochastic_heun, "SDE", 2, 2),
        Solver(churn, "churn", 2, 2, check_churn),
    )
}


def solver_names(*kinds: Kind) -> tuple[str, ...]:
    """The names of the solvers of these kinds, by default of all."""
    return tuple(name for name, solver in SOLVERS.items() if not kinds or solver.kind in kinds)
