"""One record per solver, and what it states is true."""

import inspect

import pytest
import torch

from fmlit import solvers
from fmlit.core.errors import UserError
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath
from fmlit.solvers.records import SOLVERS, Solver, solver_names

FIXED_STEP = [solver for solver in SOLVERS.values() if solver.evaluations is not None]
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def test_every_solver_has_a_record_under_its_name() -> None:
    assert set(SOLVERS) == {name for name, value in vars(solvers).items() if inspect.isfunction(value)}
    for name, solver in SOLVERS.items():
        assert solver.function is getattr(solvers, name)
    assert set(solver_names()) == set(SOLVERS)
    assert solver_names("exponential") == ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "ipndm")


def test_options_are_what_the_functions_take() -> None:
    options = {name: solver.options for name, solver in SOLVERS.items() if solver.options}
    assert options == {
        "dopri5": {"rtol": 1e-5, "atol": 1e-5},
        "dpmpp_3m": {"corrected": False},
        "unipc": {"order": 2},
        "ipndm": {"variable_step": False},
        "churn": {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003},
    }


@pytest.mark.parametrize("solver", FIXED_STEP, ids=lambda solver: solver.name)
def test_evaluations_per_step(solver: Solver) -> None:
    path, mixture, calls = CondOTPath(), GaussianMixture([[-1.0], [1.0]], 0.5), 0

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return mixture.velocity(x, path, t)

    def cost(steps: int) -> int:
        nonlocal calls
        calls = 0
        extra = {"ODE": (), "exponential": (path,), "SDE": (), "churn": (path,)}[solver.kind]
        fields = (field, lambda x, t: 0.1) if solver.kind == "SDE" else (field,)
        solver.function(*fields, torch.zeros(2, 1), torch.linspace(0.2, 0.8, steps + 1), *extra)
        return calls

    assert cost(9) - cost(6) == 3 * solver.evaluations


@each_solver
def test_options_of_another_solver_are_refused_by_name(solver: Solver) -> None:
    solver.check_options({})
    solver.check_options(solver.options)
    choice = f"choose from {', '.join(solver.options)}" if solver.options else "it takes no options"
    with pytest.raises(UserError, match=f"{solver.name} has no option 'ordr': {choice}"):
        solver.check_options({"ordr": 3})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unipc", {"order": 4}, "unipc order must be 1, 2 or 3, got 4"),
        ("unipc", {"order": 2.0}, "unipc takes order as int, got 2.0"),
        ("unipc", {"order": True}, "unipc takes order as int, got True"),
        ("ipndm", {"variable_step": 1}, "ipndm takes variable_step as bool, got 1"),
        ("dopri5", {"rtol": "1e-6"}, "dopri5 takes rtol as float, got '1e-6'"),
        ("dopri5", {"atol": False}, "dopri5 takes atol as float, got False"),
        ("dopri5", {"rtol": 0, "atol": 0}, "not both 0, got rtol=0, atol=0"),
        ("churn", {"s_min": 60.0}, r"s_min <= s_max, got 60\.0 and 50\.0"),
    ],
)
def test_bad_values_of_options_are_named(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SOLVERS[name].check_options(options)
