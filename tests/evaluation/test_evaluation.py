"""``scripts/evaluate.py``: its numbers against closed forms and direct computation, and its sweeps."""

import json
import math
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmlit import Digits
from fmlit.cli.evaluate import Sweep, evaluate
from fmlit.cli.options import Integers, Names
from fmlit.core.randomness import training_generator
from fmlit.core.tensors import to_uint8
from fmlit.evaluation import measurements, reports
from fmlit.evaluation.scoring import Scorer, choose_features
from fmlit.flows.diffusions import ReverseDiffusion
from fmlit.flows.paths import CondOTPath, VPPath
from fmlit.flows.predictions import Noise, Velocity
from fmlit.metrics import GaussianStatistics, PixelFeatures, frechet_distance
from fmlit.sampling.generate import generate
from fmlit.sampling.grids import UniformGrid
from fmlit.sampling.samplers import ODESampler, SDESampler
from fmlit.solvers import likelihood
from tests.helpers.known_model import STD, known_model

pytestmark = pytest.mark.filterwarnings("ignore:a Fréchet distance from .. images in 64 dimensions")
SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate.py"


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    both = [GaussianStatistics(), GaussianStatistics()]
    for statistics, images in zip(both, (a, b), strict=True):
        statistics.update(PixelFeatures()(images))
    return frechet_distance(*both)


def samples(n: int, sampler: ODESampler, seed: int = 0, batch_size: int = 32) -> torch.Tensor:
    return to_uint8(torch.cat([x for _, x in generate(known_model(), sampler, n, seed, batch_size)]))


def real(split: str = "train") -> torch.Tensor:
    dataset = Digits().dataset(split)
    return dataset.batch(range(len(dataset)))[0]


def test_the_script_sweeps_and_says_what_it_found(checkpoint, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    args = ["--checkpoint", checkpoint, "--n", "70", "--solver", "heun,unipc", "--steps", "3,6", "--guidance", "1,1.5"]
    args += ["--splits", "train,test", "--cache", str(tmp_path / "cache"), "--out", str(out), "--batch-size", "32"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    cells = json.loads(printed.splitlines()[-1])["cells"]
    nfe = {cell["name"]: cell["nfe"] for cell in cells}
    # Heun evaluates twice but for the last step, which is one denoising step; guidance doubles the batch.
    assert nfe == {
        **{"heun3": 5, "heun3+cfg1.5": 10, "heun6": 11, "heun6+cfg1.5": 22},
        **{"unipc3": 3, "unipc3+cfg1.5": 6, "unipc6": 6, "unipc6+cfg1.5": 12},
    }
    scores = cells[2]["scores"]
    drawn = samples(70, ODESampler("heun", 6))
    assert scores["fd_pixels_70"] == pytest.approx(distance(drawn, real()), rel=1e-9)
    assert scores["fd_pixels_70_test"] == pytest.approx(distance(drawn, real("test")), rel=1e-9)
    assert cells[2]["protocol"] == "fdpixels70-train-uint8-ema-heun6"
    assert cells[3]["protocol"] == "fdpixels70-train-uint8-ema-heun6+cfg1.5"
    cost = cells[2]["cost"]
    assert 0 <= cost["features_per_1000"] <= cost["seconds_per_1000"]
    assert 0.1 < cost["peak_memory_gb"] < 100
    assert f"{cost['peak_memory_gb']:.2f} GB" in next(
        line for line in printed.splitlines() if line.startswith("heun6 (ema, seed 0):")
    )
    assert len((out / "results.jsonl").read_text().splitlines()) == 8
    assert (out / "table.md").read_text() in printed
    assert Image.open(out / "plot.png").size == (720, 480)


def test_an_interrupted_sweep_goes_on(checkpoint, options, monkeypatch):
    first = evaluate(checkpoint, n=40, sweep=Sweep(steps=Integers([3, 4])), **options)
    path = Path(options["out"]) / "results.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{lines[1][:50]}")  # killed while it wrote the second
    drawn = []

    def recorded(model, sampler, *args, **kwargs):
        drawn.append(sampler.name)
        return generate(model, sampler, *args, **kwargs)

    monkeypatch.setattr(measurements, "generate", recorded)
    second = evaluate(checkpoint, n=40, sweep=Sweep(steps=Integers([3, 4])), **options)
    assert drawn == ["heun4"]
    assert [cell["scores"] for cell in second["cells"]] == [cell["scores"] for cell in first["cells"]]
    evaluate(checkpoint, n=40, sweep=Sweep(steps=Integers([3, 4])), **options)
    three = Sweep(steps=Integers([3]))
    assert drawn == ["heun4"]  # its line was not lost behind the half one
    evaluate(checkpoint, n=41, sweep=three, **options)
    evaluate(checkpoint, n=40, sweep=three, seed=1, **options)
    evaluate(checkpoint, n=40, sweep=three, weights=Names(["raw"]), **options)
    evaluate(checkpoint, n=40, sweep=replace(three, grid=UniformGrid()), **options)
    evaluate(checkpoint, n=40, sweep=three, out=options["out"], scoring=replace(options["scoring"], flip=True))
    assert drawn == ["heun4", "heun3", "heun3", "heun3", "heun3+uniform", "heun3"]


@pytest.mark.parametrize("path", [CondOTPath(), VPPath()])
def test_bits_per_dimension_of_a_gaussian(path):
    """The known model's density is N(0, 1/4), whatever the path and its end-point cut-offs."""
    model, data = known_model(path=path), Digits()
    scorer = Scorer(data, ["bpd"], PixelFeatures(), batch_size=6)
    told = measurements.LikelihoodMeasurement(measurements.ScoredModel(model, "ema", scorer, 6, seed=2)).measure()
    dataset = data.dataset("test")
    chosen = np.random.default_rng(2).permutation(len(dataset))[:6]
    z = likelihood.dequantize(dataset.batch(chosen.tolist())[0], training_generator(2, 0, "bpd")).double().flatten(1)
    nats = -(z**2).sum(1) / (2 * STD**2) - 64 * math.log(STD * math.sqrt(2 * math.pi))
    bits = likelihood.bits_per_dimension(nats, (1, 8, 8))
    assert told["scores"]["bpd_6"] == pytest.approx(bits.mean().item(), abs=2e-3)
    assert told["scores"]["bpd_error"] == pytest.approx(bits.std().item() / 6**0.5, abs=2e-3)
    assert told["protocol"] == "bpd6-test-dequantised-hutchinson-conditional-ema-dopri5"


@pytest.mark.parametrize("prediction", [Noise(), Velocity()], ids=repr)
def test_the_likelihood_begins_with_the_noise_of_the_sampler(prediction, monkeypatch):
    model, asked = known_model(), []
    model.prediction = prediction  # its clock begins at sigma 80, or at 0

    def recorded(field, z, times, *rest):
        asked.append((times, rest[-1]))
        return log_likelihood(field, z, times, *rest)

    log_likelihood = likelihood.log_likelihood
    monkeypatch.setattr(likelihood, "log_likelihood", recorded)
    scorer = Scorer(Digits(), ["bpd"], PixelFeatures(), batch_size=2)
    measurements.LikelihoodMeasurement(measurements.ScoredModel(model, "ema", scorer, 2, seed=0)).measure()
    ((times, path),) = asked
    assert path is model.path
    assert times[0] == ODESampler(grid=UniformGrid()).times(model)[0]


def test_bits_per_dimension_from_the_script(checkpoint, options):
    told = evaluate(checkpoint, n=4, metrics=Names(["bpd"]), **options)
    assert told["plot"] is None
    assert [cell["name"] for cell in told["cells"]] == ["bpd"]


def test_reading_classes():
    scorer = Scorer(Digits(), ["class"], PixelFeatures())
    images, labels = Digits().dataset("test").batch(range(360))
    batches = [(images[:100], labels[:100]), (images[100:], labels[100:])]
    scores = scorer.score(batches)["scores"]
    assert scores["class_360"] > 0.97
    assert scores["reader_accuracy"] > 0.97
    wrong = [(images, (labels + 1) % 10)]
    assert scorer.score(wrong)["scores"]["class_360"] < 0.02
    with pytest.raises(ValueError, match="images of a class that was asked for"):
        scorer.score([(images, None)])


def test_copies_are_found_wherever_they_are():
    images = real()
    scorer = Scorer(Digits(), ["fid"], PixelFeatures(), batch_size=359)  # a last batch of 1
    queries = images[[3, 1436]].clone()
    queries[1, 0, 0, 0] ^= 1
    distances, indices = scorer.nearest(queries, k=5)
    assert indices[:, 0].tolist() == [3, 1436]
    assert distances[0, 0] == 0
    assert distances[1, 0] == pytest.approx(1 / 127.5, rel=1e-3)
    everything = torch.cdist(PixelFeatures()(queries).double(), PixelFeatures()(images).double())
    assert torch.allclose(distances[:, 1:], everything.sort(dim=1).values[:, 1:5], rtol=1e-6)


def test_neighbors_as_a_picture(checkpoint, options):
    evaluate(checkpoint, n=33, sweep=Sweep(steps=Integers([3]), neighbors=4), **options)
    (path,) = Path(options["out"]).glob("neighbors-*.png")
    assert Image.open(path).size == ((measurements.NEIGHBORS + 1) * 50 + 2, 4 * 50 + 2)
    record = json.loads((Path(options["out"]) / "results.jsonl").read_text())
    assert len(record["nearest"]) == 4
    assert min(record["nearest"]) > 0


def test_features_by_the_size_of_the_images(monkeypatch, tmp_path):
    monkeypatch.setenv("FMLIT_INCEPTION", str(tmp_path / "weights.pth"))
    (tmp_path / "weights.pth").touch()
    assert choose_features(None, (1, 28, 28)).name == "pixels"
    assert choose_features(None, (3, 32, 32)).name == "inception"
    assert choose_features("inception", (1, 8, 8)).name == "inception"
    assert choose_features(features := PixelFeatures(), (3, 64, 64)) is features


@pytest.mark.parametrize(
    ("sampler", "label"),
    [
        (ODESampler("heun", 5), "heun"),
        (ODESampler("dpmpp_2m", 22, UniformGrid(), guidance=1.5), "dpmpp2m+uniform+cfg1.5"),
        (ODESampler("dopri5", 4), "dopri5"),
        (SDESampler(steps=7, sigma=ReverseDiffusion()), "eulermaruyama+reverse"),
    ],
)
def test_lines_of_a_plot_are_named_after_all_but_the_steps(sampler, label):
    assert reports._line({"name": sampler.name, "solver": sampler.method}) == label


def test_tables_and_plots_of_uneven_records(tmp_path):
    records = [
        {"name": "heun5", "nfe": 9.0, "solver": "heun", "guidance": 1.0, "scores": {"kid_5": -1e-5, "class_5": 1.0}},
        {"name": "bpd", "seconds": 2, "scores": {"bpd_5": 3.25}},
    ]
    rows = reports.table(records)
    assert rows[0] == ["name", "weights", "nfe", "seconds", "kid_5", "class_5", "bpd_5"]
    assert rows[2] == ["bpd", None, None, 2, None, None, 3.25]
    lines = reports.markdown(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[3].split("|")[1:5] == [" bpd   ", "         ", "     ", " 2       "]
    reports.plot(records[:1], tmp_path / "plot.png")  # a negative value on a linear axis
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize(("n", "batch"), [(1001, 250), (101, 60)])  # the last batch holds 1; the third process has none
def test_world_sizes_agree(n, batch, checkpoint, tmp_path):
    told = []
    for size in (1, 2, 3):
        out = tmp_path / f"out{size}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--"]
        command += [str(SCRIPT), "--checkpoint", checkpoint, "--n", str(n), "--batch-size", str(batch), "--steps", "3"]
        command += ["--metrics", "fid,recall,class,bpd", "--neighbors", "3", "--save-images", str(out / "images")]
        command += ["--cache", str(tmp_path / f"cache{size}"), "--out", str(out)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        told.append([json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()])
        assert len(list((out / "images" / f"heun3-ema-{n}-seed0").iterdir())) == n
    for of_one, of_two, of_three in zip(*told, strict=True):
        for other in (of_two, of_three):
            assert other["key"] == of_one["key"]
            assert other.get("images") == of_one.get("images")  # the hash of the set
            assert other.get("nfe") == of_one.get("nfe")
            assert other["scores"] == pytest.approx(of_one["scores"], rel=1e-6)
