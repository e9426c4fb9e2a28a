"""``evaluate --draws`` and sweeps over weights: every draw is kept, and one table shows all."""

import json
from pathlib import Path

import numpy as np
import pytest

from fmlit.cli.evaluate import Sweep, evaluate
from fmlit.cli.options import Integers, Names, Numbers, run
from fmlit.evaluation import measurements, reports
from fmlit.sampling.generate import generate

pytestmark = [
    pytest.mark.filterwarnings("ignore:a Fréchet distance from .. images in 64 dimensions"),
    pytest.mark.filterwarnings("ignore:more than 1% of the samples"),  # the raw weights of the known model
]


def lines(options: dict) -> list[dict]:
    return [json.loads(line) for line in (Path(options["out"]) / "results.jsonl").read_text().splitlines()]


def test_draws_have_noise_of_their_own_and_are_all_kept(checkpoint, options, monkeypatch):
    sweep, metrics = Sweep(steps=Integers([2])), Names(["fid"])
    (cell,) = evaluate(checkpoint, 40, metrics, sweep=sweep, draws=3, seed=5, **options)["cells"]
    records = lines(options)
    values = np.array([record["scores"]["fd_pixels_40"] for record in records])
    assert [record["seed"] for record in records] == [5, 6, 7]
    assert len({record["images"] for record in records}) == 3
    expected = {"fd_pixels_40": values.mean(), "fd_pixels_40_min": values.min()}
    expected["fd_pixels_40_spread"] = values.std(ddof=1)
    assert cell["scores"] == pytest.approx(expected)
    assert values.std() > 0
    assert (cell["draws"], cell["protocol"]) == (3, "fdpixels40-train-uint8-ema-heun2")

    drawn = []
    monkeypatch.setattr(measurements, "generate", lambda *args: drawn.append(args[3]) or generate(*args))
    (alone,) = evaluate(checkpoint, 40, metrics, sweep=sweep, seed=6, **options)["cells"]
    assert drawn == []  # the second draw is what this seed draws on its own
    assert alone["scores"] == {"fd_pixels_40": values[1]}
    evaluate(checkpoint, 40, metrics, sweep=sweep, seed=5, draws=4, **options)
    assert drawn == [8]


def test_weights_guidance_and_steps_in_one_table(checkpoint, options, capsys):
    sweep = Sweep(steps=Integers([2, 3]), guidance=Numbers([1.0, 1.5]))
    weights = Names(["ema", "ema_500", "raw"])
    cells = evaluate(checkpoint, 40, Names(["fid"]), weights=weights, sweep=sweep, draws=2, **options)["cells"]
    names = ["heun2", "heun2+cfg1.5", "heun3", "heun3+cfg1.5"]
    assert [(cell["weights"], cell["name"]) for cell in cells] == [(w, name) for w in weights for name in names]
    ema, named, raw = cells[:4], cells[4:8], cells[8:]
    assert [cell["scores"] for cell in ema] == [cell["scores"] for cell in named]  # the first average has both names
    assert all(a["scores"]["fd_pixels_40"] != b["scores"]["fd_pixels_40"] for a, b in zip(ema, raw, strict=True))
    assert raw[3]["protocol"] == "fdpixels40-train-uint8-raw-heun3+cfg1.5"
    assert len(lines(options)) == 24
    table = (Path(options["out"]) / "table.md").read_text()
    assert len(table.splitlines()) == 2 + 12
    assert [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")][-2:] == [
        "fd_pixels_40_min",
        "fd_pixels_40_spread",
    ]
    assert "\nheun3+cfg1.5 (raw, seed 1): fd_pixels_40 " in capsys.readouterr().out


def test_lines_of_a_plot_differ_in_the_weights(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    records = [
        {"name": f"heun{nfe}", "weights": weights, "nfe": nfe, "solver": "heun", "scores": {"fid_5": 1.0 + nfe}}
        | {"protocol": f"fid5-train-uint8-{weights}-heun{nfe}"}
        for weights in ("ema", "raw")
        for nfe in (3, 5)
    ]
    reports.plot(records, tmp_path / "plot.png")
    reports.plot(records[:2], tmp_path / "plot.png")
    both, one = (figure.axes[0] for figure in figures)
    assert [line.get_label() for line in both.lines] == ["heun ema", "heun raw"]
    assert [line.get_label() for line in one.lines] == ["heun"]
    assert (both.get_title(), one.get_title()) == ("fid5-train-uint8", "fid5-train-uint8-ema")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--draws 0", "draws must be at least 1, got 0"),
        ("--draws 2 --seed 2147483647", "seed must lie in [0, 2^31), got 2147483648"),
        ("--weights ema,ema_9", "no weights 'ema_9'; choose one of: raw, ema_500"),
    ],
)
def test_mistakes_are_named_before_anything_is_scored(given, said, checkpoint, options, capsys):
    with pytest.raises(SystemExit):
        run(evaluate, ["--checkpoint", checkpoint, "--n", "40", "--out", options["out"], *given.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (Path(options["out"]) / "results.jsonl").exists()
