"""The samplers of a sweep."""

import pytest

from fmlit.cli.evaluate import Sweep
from fmlit.cli.options import Integers, Names, Numbers
from fmlit.core.errors import UserError


def test_options_and_interval_reach_every_sampler():
    sweep = Sweep(
        solver=Names(["unipc"]),
        solver_options={"order": 3},
        steps=Integers([5, 10]),
        guidance=Numbers([1.0, 2.0]),
        guidance_interval=Numbers([0.2, 0.8]),
    )
    assert [sampler.name for sampler in sweep.build(sweep.solver, sweep.steps, sweep.guidance)] == [
        "unipc5+order3",
        "unipc5+order3+cfg2_0.2to0.8",
        "unipc10+order3",
        "unipc10+order3+cfg2_0.2to0.8",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": Names(["unipc", "heun"]), "solver_options": {"order": 3}}, "heun has no option 'order'"),
        ({"guidance_interval": Numbers([0.2, 0.8])}, "guidance_interval has no effect with guidance 1"),
        ({"guidance": Numbers([2]), "guidance_interval": Numbers([0.2])}, "guidance_interval takes two numbers"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Sweep(**options).build(options.get("solver", ["heun"]), [None], options.get("guidance", [1.0]))
