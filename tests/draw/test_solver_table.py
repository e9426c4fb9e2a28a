"""The table of solver errors measures what it says."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.budget import affordable_steps
from docs.draw import oracle, solver_table
from docs.draw.solver_table import GRIDS, all_solvers, error_table, sliced_wasserstein
from fmlit.core.randomness import image_noise, image_seeds
from fmlit.flows.mixtures import GaussianMixture
from fmlit.flows.paths import CondOTPath, VPPath
from fmlit.sampling.samplers import ODESampler
from fmlit.solvers.records import SOLVERS
from tests.helpers.known_model import STD, known_model


@pytest.mark.parametrize("d", [1, 3])
def test_sliced_wasserstein_of_a_shift_and_of_a_scaling(d):
    a = torch.randn(500, d, generator=torch.Generator().manual_seed(0))
    shift = torch.arange(1.0, d + 1)
    expected = shift.norm().item() / d**0.5
    assert sliced_wasserstein(a, a + shift, projections=4000) == pytest.approx(expected, rel=1e-5 if d == 1 else 0.02)
    # The projections of 3 a are those of a, three times as far out, whatever the direction.
    rms = a.square().mean().sqrt().item()
    assert sliced_wasserstein(a, 3 * a, projections=4000) == pytest.approx(2 * rms, rel=1e-5 if d == 1 else 0.02)


def test_sliced_wasserstein_is_of_sets_and_of_any_shape():
    a = torch.randn(64, 2, 3, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(a, a[torch.randperm(64)]) == pytest.approx(0, abs=1e-12)
    halves = torch.cat([a[:32], a[:32]])
    assert sliced_wasserstein(a, halves) == pytest.approx(sliced_wasserstein(halves, a))
    with pytest.raises(ValueError, match=r"of one shape, got \(64, 2, 3\) and \(63, 2, 3\)"):
        sliced_wasserstein(a, a[:63])


class Counted(oracle.ExactVelocity):
    """An exact field that counts how often it is asked."""

    calls = 0

    def forward(self, x, t, labels=None):
        self.calls += 1
        return super().forward(x, t, labels)


def counted_model(path):
    model = oracle.exact_model(GaussianMixture([[-2.0], [2.0]], 0.3), path)
    return model.with_net(Counted(model.net.mixture, path))


@pytest.mark.parametrize("name", all_solvers())
@pytest.mark.parametrize("path", [CondOTPath(), VPPath()], ids=["CondOT", "VP"])
def test_affordable_steps_are_the_most_that_can_be_paid(name, path):
    make, model = all_solvers()[name], counted_model(path)

    def cost(steps, grid):
        model.net.calls = 0
        make(steps, grid).sample(model, image_seeds(0, range(2)))
        return model.net.calls

    for nfe, grid in itertools.product((3, 5, 10), GRIDS.values()):
        steps = affordable_steps(make, model, nfe, grid)
        if steps is not None:
            assert cost(steps, grid) <= nfe < cost(steps + 1, grid)
        else:
            closing = grid.times(path, 2, make(2, grid).limits(model))[-1] < 1
            assert cost(2 if closing else 1, grid) > nfe


def test_every_solver_but_the_adaptive_one_is_in_the_table():
    assert {make(4, GRIDS["E"]).method for make in all_solvers().values()} == set(SOLVERS) - {"dopri5"}


def test_the_page_lists_every_solver_with_its_record():
    text = (Path(__file__).parents[2] / "docs" / "solvers.md").read_text()
    assert text.startswith(solver_table.introduction())
    assert "| `unipc` | exponential | 3 | 1 | `order` 2 |" in text
    assert "| `dopri5` | ODE | 5 | adaptive | `rtol` 1e-05, `atol` 1e-05 |" in text
    assert "| `ipndm` | exponential | 2 | 1 | `variable_step` false |" in text
    assert all(f"\n| `{name}` |" in text for name in SOLVERS)


@pytest.mark.parametrize(("path", "tolerance"), [(CondOTPath(), 1e-5), (VPPath(), 0.02)], ids=["CondOT", "VP"])
def test_reference_samples_are_exact(path, tolerance):
    """The flow of N(0, 1) to N(0, 1/4) is x / 2; the VP path starts at alpha = 0.0066 and not at 0."""
    seeds = image_seeds(0, range(50))
    labels = torch.arange(50) % 10
    samples = solver_table.reference_samples(known_model(path=path), seeds, labels)
    assert torch.allclose(samples, STD * image_noise(seeds, (1, 8, 8)), atol=tolerance)


def test_the_error_table_finds_the_order_of_solvers():
    made = {name: partial(ODESampler, name) for name in ("euler", "heun", "rk4")}
    reports = []
    table = error_table(
        oracle.exact_model(GaussianMixture([[-2.0, 0.0], [2.0, 1.0]], 0.5)),
        "Two Gaussians",
        n=200,
        nfes=(3, 40),
        grids={"U": GRIDS["U"]},
        made=made,
        report=reports.append,
    )
    assert len(reports) == 3
    euler, heun, rk4 = (table.rows[name] for name in made)
    assert rk4[3] is None
    assert euler[3].error > 3 * euler[40].error > 9 * heun[40].error > 27 * rk4[40].error
    assert table.noise > 10 * heun[40].error
    assert table.best()[40] == "rk4 U"
    text = solver_table.page([table])
    assert "## Two Gaussians" in text
    assert f"| rk4 |  | **{rk4[40].error:.4f} U** |" in text
    assert f"| euler | {euler[3].error:.4f} U | {euler[40].error:.4f} U |" in text.replace("**", "")
    assert max(len(line) for line in text.splitlines()) <= 120


def test_sde_solvers_are_as_far_from_the_reference_as_chance_has_it():
    model = oracle.exact_model(GaussianMixture([[-2.0, 0.0], [2.0, 1.0]], 0.5))
    made = {"sde": all_solvers()["stochastic_heun (SDE)"]}
    table = error_table(model, "Two Gaussians", n=400, nfes=(200,), grids={"U": GRIDS["U"]}, made=made)
    assert 0.3 * table.noise < table.rows["sde"][200].error < 3 * table.noise
