import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from fmlit import solvers
from fmlit.core.tensors import Field, expand_time
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, CosinePath, GaussianPath, PolynomialPath, VPPath
from fmlit.flows.predictions import Velocity
from fmlit.sampling.grids import EDMGrid, LogitSNRGrid
from fmlit.solvers.records import SOLVERS

PATHS = [CondOTPath(), CosinePath(), PolynomialPath(2.0), VPPath()]
METHODS: dict[str, Callable[..., Tensor]] = {
    "ddim": solvers.ddim,
    "dpmpp_2m": solvers.dpmpp_2m,
    "dpmpp_3m": solvers.dpmpp_3m,
    "dpmpp_3m corrected": partial(solvers.dpmpp_3m, corrected=True),
    "unipc 1": partial(solvers.unipc, order=1),
    "unipc": solvers.unipc,
    "unipc 3": partial(solvers.unipc, order=3),
    "ipndm": solvers.ipndm,
    "ipndm variable": partial(solvers.ipndm, variable_step=True),
}
every_method = pytest.mark.parametrize("solver", METHODS.values(), ids=METHODS)


def mixture_field(path: GaussianPath) -> Field:
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.3], [0.2, 1.0]], dtype=torch.float64)
    mixture = GaussianMixture(means, [0.5, 0.4, 0.6], [0.3, 0.4, 0.3])
    return lambda x, t: mixture.velocity(x, path, t)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def start(path: GaussianPath, times: Tensor, *shape: int) -> Tensor:
    return path.beta(times[0]) * noise(*shape)


def closed(times: Tensor) -> Tensor:
    """The same grid with a last step to t = 1."""
    return torch.cat([times, torch.ones(1, dtype=torch.float64)])


@pytest.fixture(scope="module")
def order_problem():
    """Mixture on the cosine path; N steps of equal size in lambda, from sigma = 80 to 0.002; reference error < 1e-9."""
    path = CosinePath()
    field = mixture_field(path)

    def grid(steps: int) -> Tensor:
        return LogitSNRGrid(0.002, 80.0).times(path, steps + 1)

    x0 = start(path, grid(1), 8, 2)
    return path, field, grid, x0, solvers.rk4(field, x0, grid(768))


@pytest.mark.parametrize(
    ("name", "order", "steps"),
    [
        ("ddim", SOLVERS["ddim"].order, [64, 128, 256]),
        ("dpmpp_2m", SOLVERS["dpmpp_2m"].order, [64, 128, 256]),
        ("dpmpp_3m", SOLVERS["dpmpp_3m"].order, [64, 128, 256]),  # as published
        ("dpmpp_3m corrected", 3, [64, 128, 256]),
        ("unipc 1", 2, [64, 128, 256]),
        ("unipc", SOLVERS["unipc"].order, [64, 128, 256]),
        ("unipc 3", 4, [128, 192, 256]),
        ("ipndm", SOLVERS["ipndm"].order, [64, 128, 256]),
        ("ipndm variable", 4, [192, 256, 384]),
    ],
)
def test_observed_orders_on_a_mixture(order_problem, name: str, order: int, steps: list[int]) -> None:
    path, field, grid, x0, reference = order_problem
    errors = [(METHODS[name](field, x0, grid(n), path) - reference).norm().item() for n in steps]
    slope = stats.linregress([math.log(n) for n in steps], [math.log(e) for e in errors]).slope
    assert -slope == pytest.approx(order, abs=0.2)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (solvers.ddim, 1),
        (solvers.dpmpp_2m, 2),
        (solvers.dpmpp_3m, 3),
        (partial(solvers.unipc, order=1), 1),
        (solvers.unipc, 2),
        (partial(solvers.unipc, order=3), 3),
    ],
    ids=["ddim", "dpmpp_2m", "dpmpp_3m", "unipc 1", "unipc 2", "unipc 3"],
)
def test_agrees_with_the_schedulers_of_diffusers(solver, order: int, steps: int) -> None:
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    unipc = solver not in (solvers.ddim, solvers.dpmpp_2m, solvers.dpmpp_3m)
    scheduler: Any = (UniPCMultistepScheduler if unipc else DPMSolverMultistepScheduler)(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=order, lower_order_final=unipc
    )
    scheduler.set_timesteps(steps)
    times = 1 - scheduler.sigmas.double()  # ends at 1
    path = CondOTPath()
    field, x0 = mixture_field(path), start(path, times, 16, 2)
    # Their UniPC-3 lowers its order in the last two steps, ours at sigma = 0 only: compare what comes before.
    used = steps - 2 if (unipc and order == 3) else steps
    expected = x0.float()
    for n, timestep in enumerate(scheduler.timesteps[:used]):
        output = -field(expected, times[n].expand(len(x0)))
        expected = scheduler.step(output.float(), timestep, expected).prev_sample
    assert (solver(field, x0, times[: used + 1], path) - expected).abs().max() < 1e-4


def test_ipndm_agrees_with_diffusers() -> None:
    from diffusers import IPNDMScheduler

    scheduler: Any = IPNDMScheduler()
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(1)  # it starts at alpha = 0, and ends with a fourth-order step to sigma = 0
    path = CosinePath()
    times = path.time_of_sigma((scheduler.betas / scheduler.alphas).double())[1:-1]
    field, x0 = mixture_field(path), start(path, times, 16, 2)
    expected = x0
    for n, timestep in enumerate(scheduler.timesteps[1:-1]):  # "v" is -2 / pi times the velocity of this path
        output = -2 / math.pi * field(expected, times[n].expand(len(x0)))
        expected = scheduler.step(output, timestep, expected).prev_sample
    assert (solvers.ipndm(field, x0, times, path) - expected).abs().max() < 1e-4


@every_method
@pytest.mark.parametrize("path", PATHS)
def test_exact_for_data_at_one_point(solver, path: GaussianPath) -> None:
    # z does not change: every method carries (z, eps) to alpha z + beta eps in any number of steps
    z, eps = torch.tensor([1.5, -0.5], dtype=torch.float64).expand(5, 2), noise(5, 2)
    times = EDMGrid(sigma_min=0.1).times(path, 6)
    first, last = times[:1].expand(5), times[-1:].expand(5)
    x = solver(lambda x, t: path.conditional_velocity(x, z, t), path.sample(z, eps, first), times, path)
    torch.testing.assert_close(x, path.sample(z, eps, last), rtol=1e-9, atol=1e-9)


@every_method
@pytest.mark.parametrize("path", PATHS[1:])
def test_paths_differ_by_clock_and_scale_only(solver, path: GaussianPath) -> None:
    def walk(path: GaussianPath) -> Tensor:
        times = EDMGrid(sigma_min=0.05, sigma_max=60.0).times(path, 9)
        states = solver(mixture_field(path), start(path, times, 4, 2), times, path, True)
        return states / path.alpha(times)[:, None, None]

    torch.testing.assert_close(walk(path), walk(CondOTPath()), rtol=1e-8, atol=1e-8)


def test_ddim_is_eulers_method_on_straight_paths() -> None:
    path = CondOTPath()
    times = closed(EDMGrid().times(path, 10))
    field, x0 = mixture_field(path), start(path, times, 4, 2)
    expected = solvers.euler(field, x0, times, trajectory=True)
    torch.testing.assert_close(solvers.ddim(field, x0, times, path, trajectory=True), expected, rtol=1e-12, atol=1e-12)


def test_ipndm_needs_no_variable_coefficients_for_equal_steps_of_sigma() -> None:
    path = VPPath()
    times = path.time_of_sigma(torch.linspace(10.0, 0.5, 12, dtype=torch.float64))
    field, x0 = mixture_field(path), start(path, times, 4, 2)
    fixed = solvers.ipndm(field, x0, times, path)
    torch.testing.assert_close(fixed, solvers.ipndm(field, x0, times, path, variable_step=True), rtol=1e-10, atol=1e-10)
    times = EDMGrid(sigma_max=10.0).times(path, 12)
    fixed = solvers.ipndm(field, x0, times, path)
    assert (fixed - solvers.ipndm(field, x0, times, path, variable_step=True)).abs().max() > 1e-3


@every_method
@pytest.mark.parametrize("path", PATHS)
def test_a_grid_that_ends_at_data_closes_with_a_denoising_step(solver, path: GaussianPath) -> None:
    seen = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return oracle(x, t)

    oracle, times = mixture_field(path), EDMGrid().times(path, 8)
    x0 = start(path, times, 4, 2)
    x = solver(field, x0, closed(times), path)
    assert seen == times.tolist()  # one evaluation per step, none at t = 1
    if solver not in (METHODS["unipc 1"], METHODS["unipc"], METHODS["unipc 3"]):  # UniPC corrects before it goes on
        last, t = solver(oracle, x0, times, path), times[-1:].expand(4)
        torch.testing.assert_close(x, Velocity().data(path, oracle(last, t), last, t), rtol=1e-12, atol=1e-12)


@every_method
def test_shapes_dtypes_and_trajectories(solver) -> None:
    path, z = CondOTPath(), torch.linspace(-1, 1, 5)
    times = closed(EDMGrid().times(path, 7))

    def field(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (5,)
        assert t.dtype == torch.float32
        return path.conditional_velocity(x, expand_time(z, x), t)

    x0 = start(path, times, 5, 3, 5, 5).float()
    states = solver(field, x0, times, path, trajectory=True)
    assert states.shape == (8, 5, 3, 5, 5)
    assert states.dtype == torch.float32
    assert torch.equal(states[0], x0)
    assert torch.equal(states[-1], solver(field, x0, times, path))
    torch.testing.assert_close(states[-1], expand_time(z, x0).expand_as(x0), rtol=1e-3, atol=1e-3)


@every_method
def test_float32_is_enough(solver) -> None:
    path = CondOTPath()
    times = closed(EDMGrid().times(path, 12))
    field, x0 = mixture_field(path), start(path, times, 16, 2)
    assert (solver(field, x0.float(), times, path) - solver(field, x0, times, path)).abs().max() < 1e-4


@every_method
def test_bad_input(solver) -> None:
    path, x0 = CondOTPath(), noise(4, 2)
    field = mixture_field(path)
    with pytest.raises(ValueError, match=r"start at t = 0, where alpha = 0 .*start later"):
        solver(field, x0, torch.linspace(0, 1, 5), path)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 0\.5 to 1\.5"):
        solver(field, x0, torch.tensor([0.5, 1.0, 1.5]), path)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got -0\.5 to 0\.5"):
        solver(field, x0, torch.tensor([-0.5, 0.5]), path)
    with pytest.raises(ValueError, match="increase strictly, got 1 then 0"):
        solver(field, x0, torch.tensor([1.0, 0.0]), path)
    with pytest.raises(ValueError, match=r"must return shape \(4, 2\) like x, got \(4,\)"):
        solver(lambda x, t: t, x0, torch.tensor([0.1, 0.5]), path)
    with pytest.raises(
        ValueError, match=r"in step 2 of 3, from t = 0\.5 to 0\.75|in step 1 of 3, from t = 0\.25 to 0\.5"
    ):
        solver(lambda x, t: x / (expand_time(t, x) != 0.5), x0, torch.tensor([0.25, 0.5, 0.75, 0.8]), path)


@pytest.mark.parametrize("order", [0, 4])
def test_unipc_order(order: int) -> None:
    with pytest.raises(ValueError, match=f"unipc order must be 1, 2 or 3, got {order}"):
        solvers.unipc(mixture_field(CondOTPath()), noise(4, 2), torch.tensor([0.1, 0.5]), CondOTPath(), order=order)
