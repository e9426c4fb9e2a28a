"""The pictures draw and are true, and their command refuses what it cannot do."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from docs.draw import command, images, memorization, odes, oracle, picard, plane, sdes, solver_table, style
from docs.draw.command import figures
from docs.draw.memorization import real_digits, sample_exactly
from docs.draw.solver_table import GRIDS, error_table, sliced_wasserstein
from fmlit import Checkerboard, Moons, solvers
from fmlit.flows.diffusions import ornstein_uhlenbeck
from fmlit.metrics.memorization import memorization as compare
from fmlit.sampling.samplers import ODESampler
from tests.helpers.known_model import known_model, save_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "figures.py"
SMALL = {
    "brownian_paths": partial(sdes.brownian_paths, paths=2, cloud=20, steps=10),
    "linear_sde": partial(sdes.linear_sde, steps=20),
    "plane_simulations": partial(plane.plane_simulations, n=25, steps=12),
    "gaussian_to_data": partial(plane.gaussian_to_data, n=150),
}


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


# The pictures


@pytest.mark.parametrize("name", command.EXACT)
def test_every_exact_picture_draws(name, tmp_path):
    figure = SMALL.get(name, command.EXACT[name])()
    assert isinstance(figure, Figure)
    assert all(panel.has_data() for panel in figure.axes)
    style.save_png(figure, tmp_path / "picture.png")
    width, height = Image.open(tmp_path / "picture.png").size
    assert 500 < width < 1300
    assert height < width


@pytest.mark.slow
def test_all_pictures_in_full_size_are_small_files(tmp_path):
    figures(str(tmp_path), checkpoint=str(save_run(tmp_path / "run", known_model())))
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.is_file()}
    assert set(sizes) == set(command.PICTURES)
    assert max(size for name, size in sizes.items() if name.endswith(".png")) < 150_000
    assert sizes[command.ANIMATED] < 1_500_000


@pytest.mark.parametrize("classes", [None, 10])
def test_sampling_trajectories_name_the_classes(classes):
    figure = images.sampling_trajectories(known_model((3, 4, 4), classes), digits=2, steps=12)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ([] if classes is None else ["3", "4"])
    with pytest.raises(ValueError, match=r"images \(C, H, W\), and this model makes \(2,\)"):
        images.sampling_trajectories(known_model((2,), None))


def test_the_style_of_the_pictures_is_theirs_alone():
    before = dict(mpl.rcParams)
    odes.linear_ode()
    assert dict(mpl.rcParams) == before


def test_a_picture_of_many_colors_keeps_its_plain_areas(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "LARGEST", 60_000)
    figure = Figure(figsize=(2, 2), facecolor="#E8E8E8")
    axes = figure.subplots()
    axes.imshow(torch.rand(100, 100, 3, generator=torch.Generator().manual_seed(0)).numpy())
    before = style.pixels(figure)
    style.save_png(figure, tmp_path / "noise.png")
    after = Image.open(tmp_path / "noise.png")
    assert after.mode == "P"  # in full colors it would be too large
    assert after.convert("RGB").getpixel((2, 2)) == before.getpixel((2, 2)) == (0xE8,) * 3
    style.save_png(odes.linear_ode(), tmp_path / "lines.png")
    assert Image.open(tmp_path / "lines.png").mode == "RGB"


def test_the_animation_carries_noise_to_data(tmp_path):
    style.save_gif(plane.gaussian_to_data_frames(frames=4, n=50), tmp_path / "film.gif", seconds=0.4, hold=1.0)
    film = Image.open(tmp_path / "film.gif")
    assert film.n_frames == 4
    durations = []
    for k in range(4):
        film.seek(k)
        durations.append(film.info["duration"])
    assert durations == [100, 100, 100, 1000]
    assert film.info["loop"] == 0


# What the pictures claim


def test_picard_iterates_are_the_taylor_polynomials_and_converge():
    drift, _ = ornstein_uhlenbeck(3.0, 0.0)
    times = torch.linspace(0, 1, 2001, dtype=torch.float64)
    iterates = picard.picard_iterates(drift, float64([2.0]), times, 16)[:, :, 0, 0]
    assert torch.allclose(iterates[2], 2 * (1 - 3 * times + (3 * times) ** 2 / 2), atol=1e-5)
    errors = (iterates - 2 * torch.exp(-3 * times)).abs().amax(1)
    bounds = errors[0] * torch.cumprod(torch.cat([torch.ones(1), 3 / torch.arange(1.0, 17)]), 0)
    assert (errors <= bounds + 1e-5).all()
    assert errors[-1] < 1e-5


@pytest.mark.parametrize("wait", [0.0, 0.4])
def test_the_field_that_is_not_lipschitz_has_more_than_one_solution(wait):
    t = torch.linspace(0, 1, 11, dtype=torch.float64, requires_grad=True)
    x = (t - wait).clamp(min=0) ** 2
    (slope,) = torch.autograd.grad(x.sum(), t)
    assert torch.allclose(slope, picard.square_root(x.detach(), t))
    assert not picard.square_root(torch.zeros(1), torch.zeros(1)).any()  # and so is 0


def test_the_flow_never_folds_the_grid():
    x = style.plane_grid(1.4, 41).requires_grad_()
    end = solvers.rk4(odes.waves, x, torch.linspace(0, 1, 61))
    rows = torch.stack([torch.autograd.grad(end[:, i].sum(), x, retain_graph=True)[0] for i in (0, 1)], dim=1)
    assert torch.linalg.det(rows).min() > 0


@pytest.mark.parametrize(
    ("mixture", "data", "scale", "center"),
    [
        (oracle.checkerboard(), Checkerboard(4000), 1.0, (0.0, 0.0)),
        (oracle.moons(), Moons(4000, noise=0.06), 1.6, (0.5, 0.25)),
    ],
    ids=["checkerboard", "moons"],
)
def test_drawn_mixtures_are_the_data_sets_in_smooth(mixture, data, scale, center):
    points = scale * (data.dataset("train").batch(range(4000))[0] - torch.tensor(center))
    samples = mixture.sample(4000, torch.Generator().manual_seed(0))
    assert sliced_wasserstein(samples, points) < 0.1
    assert sliced_wasserstein(samples, 1.2 * points) > 0.15


# Memorization


def test_the_exact_field_of_the_digits_returns_training_points():
    digits = real_digits()
    assert digits.shape == (1797, 1, 8, 8)
    found = compare(sample_exactly(digits, 40), digits)
    assert found.share > 0.9
    assert found.verdict.startswith("memorization")
    assert len(found.nearest.unique()) > 30  # of many points, not of one


def test_digits_that_were_not_trained_on_are_no_copies():
    digits = real_digits()
    fresh = compare(digits[1437:], digits[:1437])
    shifted = compare(digits[:200].roll(1, dims=3), digits)
    for found in (fresh, shifted):
        assert found.share < 0.02
        assert found.verdict.startswith("no memorization")


def test_the_picture_of_copies_states_both_verdicts():
    figure = memorization.digits_as_diracs(known_model(), n=20, shown=4)
    titles = [panel.get_title() for panel in figure.axes]
    assert "\nmemorization: 100%" in titles[0]
    assert "\nno memorization: 0%" in titles[1]


# The command


def test_the_script_draws_what_it_is_asked_for(tmp_path, monkeypatch, capsys):
    args = ["--only", "linear_ode.png,picard_lindeloef.png", "--out", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["pictures"] == ["linear_ode.png", "picard_lindeloef.png"]
    assert len(summary["left_out"]) == len(command.PICTURES) - 2
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["linear_ode.png", "picard_lindeloef.png"]


def test_pictures_of_a_trained_model_are_drawn_from_its_run(tmp_path):
    run = save_run(tmp_path / "run", known_model())
    summary = figures(str(tmp_path / "out"), only=["sampling_trajectories.png"], checkpoint=str(run))
    assert summary["pictures"] == ["sampling_trajectories.png"]
    assert (tmp_path / "out" / "sampling_trajectories.png").stat().st_size > 10_000


def test_the_table_is_written_for_the_exact_field_and_for_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(solver_table, "error_table", partial(_small_table, error_table))
    file = tmp_path / "deep" / "solvers.md"
    exact = [
        "The exact field of a mixture, 128 Gaussians on a checkerboard, on the CondOT path",
        "The same on the VP path",
    ]
    assert list(figures(table=str(file))["best"]) == exact
    run = save_run(tmp_path / "run", known_model())
    best = figures(table=str(file), checkpoint=str(run))["best"]
    assert list(best) == [*exact, "A trained network: MLP for data of shape (1, 8, 8)"]
    assert all(f"## {title}" in file.read_text() for title in best)


def _small_table(measure, model, title, n, report):
    assert n >= 200
    made = {"euler": partial(ODESampler, "euler")}
    return measure(model, title, 10, (2,), {"U": GRIDS["U"]}, made, report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only": ["monalisa.png"]}, "there is no picture monalisa.png; choose from trajectory_field_ode.png, "),
        ({"only": ["digits_as_diracs.png"]}, "digits_as_diracs.png shows a trained model; give --checkpoint"),
        ({"only": ["flow.png"], "table": "solvers.md"}, "only, table and curves_of are three tasks"),
        ({"table": "solvers.txt"}, "solvers.txt must end in .md"),
        ({"checkpoint": "nowhere"}, "there is no checkpoint nowhere"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_named_before_anything_is_drawn(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        figures("out", **arguments)
    assert not list(tmp_path.iterdir())


def test_curves_of_runs_are_drawn_into_one_picture(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,images_seen,loss\n1,10,4.0\n2,20,2.0\n")
    summary = figures(str(tmp_path), curves_of=[str(tmp_path / "run")])
    assert Image.open(summary["picture"]).width > 300
    with pytest.raises(ValueError, match=r"curves_of: there is no .*metrics.csv; give folders of runs"):
        figures(str(tmp_path), curves_of=[str(tmp_path / "nothing")])
