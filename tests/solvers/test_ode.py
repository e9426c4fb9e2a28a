import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fmlit import solvers
from fmlit.core.tensors import expand_time
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, CosinePath, GaussianPath, VPPath
from fmlit.flows.times import Limits
from fmlit.sampling.grids import UniformGrid
from fmlit.solvers.records import SOLVERS

FIXED = [solvers.euler, solvers.midpoint, solvers.heun, solvers.rk4]
ALL = [*FIXED, solvers.dopri5]
THETA = 0.7


def linear(x: Tensor, t: Tensor) -> Tensor:
    return -THETA * x


def grid(steps: int, end: float = 1.0) -> Tensor:
    return torch.linspace(0, end, steps + 1, dtype=torch.float64)


def start(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.3], [0.2, 1.0]], dtype=torch.float64)
    return GaussianMixture(means, [0.5, 0.4, 0.6], [0.3, 0.4, 0.3])


def observed_order(steps: list[int], errors: list[float]) -> float:
    return -stats.linregress([math.log(n) for n in steps], [math.log(e) for e in errors]).slope


@pytest.mark.parametrize(
    ("solver", "degree"), [(solvers.euler, 1), (solvers.midpoint, 2), (solvers.heun, 2), (solvers.rk4, 4)]
)
def test_linear_ode_gives_the_methods_stability_polynomial(solver, degree: int) -> None:
    # a Runge-Kutta method of order p = number of stages multiplies x by the Taylor polynomial of e^(-theta h)
    x0, times = start(3, 2), torch.tensor([0.0, 0.1, 0.5, 1.3], dtype=torch.float64)
    factors = [sum((-THETA * h) ** k / math.factorial(k) for k in range(degree + 1)) for h in times.diff().tolist()]
    expected = x0 * torch.tensor([1.0, *factors], dtype=torch.float64).cumprod(0)[:, None, None]
    torch.testing.assert_close(solver(linear, x0, times, trajectory=True), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("solver", "degree"), [(solvers.euler, 0), (solvers.midpoint, 1), (solvers.heun, 1), (solvers.rk4, 3)]
)
def test_fields_of_time_alone_are_integrated_as_by_the_quadrature_rule(solver, degree: int) -> None:
    x0, times = start(4, 4), torch.tensor([-0.2, 0.1, 0.5, 1.3], dtype=torch.float64)

    def integrate(power: int) -> Tensor:
        return solver(lambda x, t: expand_time(t**power, x).expand_as(x), x0, times) - x0

    def exact(power: int) -> float:
        return (1.3 ** (power + 1) - (-0.2) ** (power + 1)) / (power + 1)

    assert (integrate(degree) - exact(degree)).abs().max() < 1e-13
    assert (integrate(degree + 1) - exact(degree + 1)).abs().min() > 1e-3


@pytest.mark.parametrize(("path", "end"), [(CondOTPath(), 1.0), (CosinePath(), 1.0), (VPPath(), 0.99)])
def test_observed_orders_on_a_mixture(path: GaussianPath, end: float) -> None:
    # float64, uniform grids; the VP grid ends before the singularity of its field
    oracle, x0 = mixture(), start(8, 2)

    def field(x: Tensor, t: Tensor) -> Tensor:
        return oracle.velocity(x, path, t)

    reference = solvers.rk4(field, x0, grid(256, end))  # error below 1e-8
    for name, steps in [
        ("euler", [64, 96, 128]),
        ("midpoint", [32, 48, 64]),
        ("heun", [32, 48, 64]),
        ("rk4", [16, 24, 32]),
    ]:
        solver = SOLVERS[name]
        errors = [(solver.function(field, x0, grid(n, end)) - reference).norm().item() for n in steps]
        assert observed_order(steps, errors) == pytest.approx(solver.order, abs=0.2), name


def test_dopri5_meets_the_linear_odes_closed_form() -> None:
    x0, times = start(5, 3), grid(7, 5.0)
    states = solvers.dopri5(linear, x0, times, rtol=1e-8, atol=1e-8, trajectory=True)
    exact = x0 * torch.exp(-THETA * times)[:, None, None]
    assert (states - exact).abs().max() < 1e-7
    assert torch.equal(states[-1], solvers.dopri5(linear, x0, times, rtol=1e-8, atol=1e-8))
    assert (solvers.dopri5(linear, x0, times) - exact[-1]).abs().max() > 1e-8  # the default tolerances are used


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_dopri5_never_looks_beyond_the_end(size: float) -> None:
    seen = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return size * torch.cos(x + expand_time(t, x))

    solvers.dopri5(field, 5 * start(4, 2), torch.tensor([0.0, 0.3, 1.0]))
    assert min(seen) == 0
    assert max(seen) <= 1
    assert sum(t > 1 - 1e-9 for t in seen) <= 3  # the guess of a first step, and the last two stages of the last step


@pytest.mark.parametrize("path", [CondOTPath(), CosinePath(), VPPath()])
def test_ode_ends_in_the_mixture(path: GaussianPath) -> None:
    # Heun, 50 uniform steps; n = 20,000
    oracle, n = mixture(), 20_000
    limits = Limits(0.0, 0.999) if isinstance(path, VPPath) else Limits(0.0, 1.0)
    times = UniformGrid().times(path, 50, limits)
    x = solvers.heun(lambda x, t: oracle.velocity(x, path, t), start(n, 2), times)
    for axis in range(2):

        def cdf(values, axis: int = axis):
            normals = zip(oracle.weights, oracle.means[:, axis], oracle.stds, strict=True)
            return sum(w.item() * stats.norm.cdf(values, m.item(), s.item()) for w, m, s in normals)

        assert stats.kstest(x[:, axis].numpy(), cdf).pvalue > 1e-3
    mean, second = oracle.weights @ oracle.means, (oracle.weights * oracle.stds**2).sum() * torch.eye(2)
    covariance = second + torch.cov(oracle.means.T, correction=0, aweights=oracle.weights)
    deviations = x - mean
    products = deviations[:, :, None] * deviations[:, None, :]
    assert (deviations.mean(0).abs() < 3 * deviations.std(0) / n**0.5).all()
    assert ((products.mean(0) - covariance).abs() < 3 * products.std(0) / n**0.5).all()


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_agrees_with_the_flow_matching_schedulers_of_diffusers(method: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    path, oracle, x0 = CondOTPath(), mixture(), start(16, 2)

    def field(x: Tensor, t: Tensor) -> Tensor:
        return oracle.velocity(x, path, t)

    scheduler: Any = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler}[method]()
    scheduler.set_timesteps(10)
    expected = x0.float()
    for timestep in scheduler.timesteps:  # their clock is the noise level, their model output -u
        index = 0 if scheduler.step_index is None else scheduler.step_index
        t = (1 - scheduler.sigmas[index].double()).expand(len(x0))
        expected = scheduler.step(-field(expected, t), timestep, expected).prev_sample
    times = 1 - scheduler.sigmas.double().unique_consecutive()
    if method == "heun":  # theirs closes with an Euler step to sigma = 0
        actual = solvers.euler(field, solvers.heun(field, x0, times[:-1]), times[-2:])
    else:
        actual = solvers.euler(field, x0, times)
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 4, 4), (2, 5, 4, 4, 3), (3,)])
def test_shapes_dtypes_and_trajectories(solver, shape: tuple[int, ...]) -> None:
    x0, times = start(*shape, dtype=torch.float32), grid(3)

    def field(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == shape[:1]
        assert t.dtype == torch.float32
        return expand_time(1 + t, x) * x

    states = solver(field, x0, times, trajectory=True)
    assert states.shape == (4, *shape)
    assert states.dtype == torch.float32
    assert torch.equal(states[0], x0)
    assert torch.equal(states[-1], solver(field, x0, times))
    torch.testing.assert_close(states[-1], x0 * math.exp(1.5), rtol=0.35 if solver is solvers.euler else 0.08, atol=0)


@pytest.mark.parametrize("solver", FIXED)
def test_step_sizes_are_those_of_float64(solver) -> None:
    times = torch.tensor([1 - 1e-9, 1.0], dtype=torch.float64)  # equal in float32
    x = solver(lambda x, t: torch.full_like(x, 1e9), torch.zeros(2, 2), times)
    torch.testing.assert_close(x, torch.ones(2, 2))


@pytest.mark.parametrize("solver", ALL)
def test_gradients_flow_through_the_solver(solver) -> None:
    x0 = start(2, 3).requires_grad_()
    solver(linear, x0, grid(20)).sum().backward()
    torch.testing.assert_close(x0.grad, torch.full_like(x0, math.exp(-THETA)), rtol=0.02, atol=0)


class _CountScalarReads(TorchDispatchMode):
    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", FIXED)
def test_no_step_waits_for_the_device(solver) -> None:
    with _CountScalarReads() as counter:
        solver(linear, start(2, 3), grid(5))
    assert counter.reads == 0


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.0, 0.5, 0.5, 1.0], r"increase strictly, got 0\.5 then 0\.5 at entry 2"),
        ([1.0, 0.0], "increase strictly, got 1 then 0 at entry 1"),
        ([0.0, math.nan], "got 0 then nan"),
        ([0.0, math.inf], "got 0 then inf"),
        ([0.0], r"at least 2 entries, got shape \(1,\)"),
        ([[0.0, 1.0]], r"1-D with at least 2 entries, got shape \(1, 2\)"),
    ],
)
def test_bad_times(solver, times: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solver(linear, start(2, 3), torch.tensor(times))


@pytest.mark.parametrize("solver", ALL)
def test_bad_fields_and_starts(solver) -> None:
    with pytest.raises(ValueError, match=r"must return shape \(3, 3\) like x, got \(3,\) at t = 0"):
        solver(lambda x, t: t, start(3, 3), grid(4))  # would broadcast
    with pytest.raises(ValueError, match="floating-point"):
        solver(linear, torch.ones(2, 3, dtype=torch.int64), grid(4))
    with pytest.raises(ValueError, match=r"in float32 or float64, got torch\.bfloat16"):
        solver(linear, torch.ones(2, 3, dtype=torch.bfloat16), grid(4))
    with pytest.raises(ValueError, match="x0 has NaN or infinite values"):
        solver(linear, torch.tensor([[1.0, math.inf]]), grid(4))


@pytest.mark.parametrize("solver", FIXED)
def test_a_non_finite_field_is_named_by_step_and_time(solver) -> None:
    def field(x: Tensor, t: Tensor) -> Tensor:
        return x / (expand_time(t, x) < 0.55)

    with pytest.raises(ValueError, match=r"appear in step 3 of 4, from t = 0\.5 to 0\.75|step 4 of 4, from t = 0\.75"):
        solver(field, start(2, 3), grid(4))
    assert solver(field, start(2, 3), grid(4, 0.5)).isfinite().all()


def test_dopri5_errors() -> None:
    with pytest.raises(ValueError, match=r"dopri5: the field has NaN or infinite values at t = 0\.[5-9]"):
        solvers.dopri5(lambda x, t: x / (expand_time(t, x) < 0.5), start(2, 3), grid(4))
    with pytest.raises(
        ValueError, match=r"dopri5 cannot reach rtol=1e-05, atol=1e-05 in torch\.float64: underflow in dt"
    ):
        solvers.dopri5(lambda x, t: x**2, torch.ones(1, 1, dtype=torch.float64), grid(1, 2.0))  # x = 1 / (1 - t)
    with pytest.raises(ValueError, match="got rtol=-1, atol=0"):
        solvers.dopri5(linear, start(2, 3), grid(4), rtol=-1, atol=0)
