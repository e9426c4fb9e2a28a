"""``scripts/evaluate.py``: its numbers against closed forms and direct computation, its sweeps, and its refusals."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from known_model import STD, known_model, save_run
from PIL import Image

from fmlit import likelihood
from fmlit.commands.evaluate import evaluate
from fmlit.commands.options import Integers, Names, Numbers, run
from fmlit.data import Digits, ImageFolder, TwoPoints
from fmlit.data.datasets import InMemoryDataset
from fmlit.data.imagefiles import read_images, save_npz, save_pngs
from fmlit.evaluation import cells, reports, scoring
from fmlit.evaluation.scoring import Scorer, choose_features, nearest_in
from fmlit.metrics import GaussianStatistics, PixelFeatures, frechet_distance
from fmlit.paths import CondOTPath, VPPath
from fmlit.randomness import training_generator
from fmlit.samplers import ODESampler, generate
from fmlit.tensors import to_uint8
from fmlit.times import UniformGrid

pytestmark = pytest.mark.filterwarnings("ignore:a Fréchet distance from .. images in 64 dimensions")
SCRIPT = Path(__file__).parent.parent / "scripts" / "evaluate.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_run(tmp_path_factory.mktemp("runs") / "known", known_model()))


@pytest.fixture
def options(tmp_path) -> dict:
    return {"cache": str(tmp_path / "cache"), "out": str(tmp_path / "out"), "batch_size": 32}


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
    assert len((out / "results.jsonl").read_text().splitlines()) == 8
    assert (out / "table.md").read_text() in printed
    assert Image.open(out / "plot.png").size == (720, 480)


def test_an_interrupted_sweep_goes_on(checkpoint, options, monkeypatch):
    first = evaluate(checkpoint, n=40, steps=Integers([3, 4]), **options)
    path = Path(options["out"]) / "results.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{lines[1][:50]}")  # killed while it wrote the second
    drawn = []

    def recorded(model, sampler, *args, **kwargs):
        drawn.append(sampler.name)
        return generate(model, sampler, *args, **kwargs)

    monkeypatch.setattr(cells, "generate", recorded)
    second = evaluate(checkpoint, n=40, steps=Integers([3, 4]), **options)
    assert drawn == ["heun4"]
    assert [cell["scores"] for cell in second["cells"]] == [cell["scores"] for cell in first["cells"]]
    evaluate(checkpoint, n=40, steps=Integers([3, 4]), **options)
    assert drawn == ["heun4"]  # its line was not lost behind the half one
    evaluate(checkpoint, n=41, steps=Integers([3]), **options)
    evaluate(checkpoint, n=40, steps=Integers([3]), seed=1, **options)
    evaluate(checkpoint, n=40, steps=Integers([3]), weights="raw", **options)
    evaluate(checkpoint, n=40, steps=Integers([3]), grid=UniformGrid(), **options)
    evaluate(checkpoint, n=40, steps=Integers([3]), flip=True, **options)
    assert drawn == ["heun4", *["heun3"] * 5]


def test_pictures_score_like_the_samples_that_they_are(checkpoint, options, tmp_path):
    folder = tmp_path / "pictures"
    told = evaluate(checkpoint, n=45, steps=Integers([3]), save_images=str(folder), **options)["cells"][0]
    (pictures,) = folder.iterdir()
    assert pictures.name == "heun3-ema-45-seed0"
    drawn = samples(45, ODESampler("heun", 3))
    assert torch.equal(read_images(str(pictures), (1, 8, 8)).batch(range(45))[0], drawn)
    with open(tmp_path / "x.npz", "wb") as file:
        save_npz(file, drawn)
    for path in (str(pictures), str(tmp_path / "x.npz")):
        read = evaluate(images=path, data=Digits(), metrics=Names(["kid", "fid"]), **options)["cells"][0]
        assert read["scores"]["fd_pixels_45"] == pytest.approx(told["scores"]["fd_pixels_45"], rel=1e-12)
        assert read["protocol"] == "fdpixels45-train-uint8"
    # The cell is known, but the pictures that are asked for are not there.
    evaluate(checkpoint, n=45, steps=Integers([3]), save_images=str(tmp_path / "again"), **options)
    assert len(list((tmp_path / "again" / pictures.name).iterdir())) == 45


def test_pictures_that_are_not_comparable_are_named(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    save_pngs(folder, torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    Image.new("RGB", (8, 9)).save(folder / "tall.png")
    with pytest.raises(ValueError, match=r"tall.png is 8x9 pixels, and the data 8x8"):
        read_images(str(folder), (1, 8, 8))
    Image.new("RGB", (8, 8), "red").save(folder / "tall.png")
    with pytest.raises(ValueError, match=r"tall.png is in colour, and the data are grey"):
        read_images(str(folder), (1, 8, 8)).batch(range(3))
    assert read_images(str(folder), (3, 8, 8)).batch([2])[0][0, :, 0, 0].tolist() == [255, 0, 0]
    (folder / "tall.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read the picture .*tall.png"):
        read_images(str(folder), (1, 8, 8))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no pictures in"):
        read_images(str(empty), (1, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(2, 8, 8\) are read from an .npz"):
        read_images(str(folder), (2, 8, 8))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": np.zeros((3, 8, 8, 1), np.uint8)}, "no .npz with images in arr_0"),
        ({"arr_0": np.zeros((3, 8, 8, 1), np.float32)}, r"must be uint8 \(N, 8, 8, 1\) like the data, got float32"),
        ({"arr_0": np.zeros((3, 1, 8, 8), np.uint8)}, r"like the data, got uint8 \(3, 1, 8, 8\)"),
        ({"arr_0": np.array([None])}, "no .npz with images"),  # a pickle, which is not opened
    ],
)
def test_arrays_that_are_no_images(arrays, said, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        read_images(str(tmp_path / "x.npz"), (1, 8, 8))


@pytest.mark.parametrize("path", [CondOTPath(), VPPath()])
def test_bits_per_dimension_of_a_gaussian(path):
    """The known model's density is N(0, 1/4), whatever the path and its end-point cut-offs."""
    model, data = known_model(path=path), Digits()
    told = scoring.bits_per_dimension(model, data, 6, seed=2, batch_size=6)
    dataset = data.dataset("test")
    chosen = np.random.default_rng(2).permutation(len(dataset))[:6]
    z = likelihood.dequantise(dataset.batch(chosen.tolist())[0], training_generator(2, 0, "bpd")).double().flatten(1)
    nats = -(z**2).sum(1) / (2 * STD**2) - 64 * math.log(STD * math.sqrt(2 * math.pi))
    bits = likelihood.bits_per_dimension(nats, (1, 8, 8))
    assert told["scores"]["bpd_6"] == pytest.approx(bits.mean().item(), abs=2e-3)
    assert told["scores"]["bpd_error"] == pytest.approx(bits.std().item() / 6**0.5, abs=2e-3)
    assert told["protocol"] == "bpd6-test-dequantised-hutchinson-conditional-ema-dopri5"


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
    dataset = InMemoryDataset(images)
    queries = images[[3, 1436]].clone()
    queries[1, 0, 0, 0] ^= 1
    distances, indices = nearest_in(dataset, PixelFeatures(), queries, k=5, batch_size=359)  # a last batch of 1
    assert indices[:, 0].tolist() == [3, 1436]
    assert distances[0, 0] == 0
    assert distances[1, 0] == pytest.approx(1 / 127.5, rel=1e-3)
    everything = torch.cdist(PixelFeatures()(queries).double(), PixelFeatures()(images).double())
    assert torch.allclose(distances[:, 1:], everything.sort(dim=1).values[:, 1:5], rtol=1e-6)


def test_neighbours_as_a_picture(checkpoint, options):
    evaluate(checkpoint, n=33, steps=Integers([3]), neighbours=4, **options)
    (path,) = Path(options["out"]).glob("neighbours-*.png")
    assert Image.open(path).size == ((cells.NEIGHBOURS + 1) * 50 + 2, 4 * 50 + 2)
    record = json.loads((Path(options["out"]) / "results.jsonl").read_text())
    assert len(record["nearest"]) == 4
    assert min(record["nearest"]) > 0


def test_only_the_reference(options):
    cache = options["cache"]
    told = evaluate(data=Digits(), reference_only=True, splits=Names(["train", "test"]), cache=cache)
    assert [Path(path).name.split("-")[1] for path in told["references"]] == ["train", "test"]
    assert sorted(map(str, Path(cache).iterdir())) == sorted(told["references"])
    assert not Path(options["out"]).exists()


def test_features_by_the_size_of_the_images(monkeypatch, tmp_path):
    monkeypatch.setenv("FMLIT_INCEPTION", str(tmp_path / "weights.pth"))
    (tmp_path / "weights.pth").touch()
    assert choose_features(None, (1, 28, 28)).name == "pixels"
    assert choose_features(None, (3, 32, 32)).name == "inception"
    assert choose_features("inception", (1, 8, 8)).name == "inception"
    assert choose_features(features := PixelFeatures(), (3, 64, 64)) is features


def refusal(capsys, *args: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(evaluate, [str(arg) for arg in args])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--metrics is", "unknown metric 'is': choose from fid, kid"),
        ("--metrics bpd --steps 5", "--steps has no meaning with --metrics bpd"),
        ("--images x --guidance 2", "--guidance has no meaning with --images"),
        ("--images x --metrics fid,class", "metric class asks the model, and --images have none"),
        ("--images nowhere", "there is no folder nowhere"),
        ("--images nowhere.npz", "No such file or directory: 'nowhere.npz'"),
        ("--reference-only --n 50000", "--n has no meaning with --reference_only"),
        ("--n 1", "n must be at least 2, got 1"),
        ("--batch-size 0", "batch_size must be at least 1"),
        ("--neighbours -1", "neighbours must be a number of samples"),
        ("--splits train,validation", "split must be one of train, test, got 'validation'"),
        ("--solver heun,hoin", "unknown solver 'hoin'"),
        ("--steps 5,0", "steps must be at least 1, got 0"),
        ("--steps 5,ten", "expected values such as 5,10,20"),
        ("--features pixel", "features: Expected one of ['inception', 'pixels']"),
        ("--weights ema_9", "no weights 'ema_9'"),
        ("--data Digits --data.size 3", "data.size: no such option"),
    ],
)
def test_contradictions_are_named_in_one_line(checkpoint, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, "--checkpoint", checkpoint, *options.split())


def test_models_and_data_that_do_not_fit(tmp_path, checkpoint, options, capsys):
    vectors = str(save_run(tmp_path / "vectors", known_model((1,), None), TwoPoints()))
    with pytest.raises(ValueError, match="evaluation is of images, and TwoPoints holds vectors"):
        evaluate(vectors, **options)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"model makes images of shape \(1, 8, 8\), and ImageFolder holds \(3, 9, 9\)"):
        evaluate(checkpoint, data=ImageFolder(str(tmp_path), 9), **options)
    unconditional = str(save_run(tmp_path / "unconditional", known_model(num_classes=None)))
    with pytest.raises(ValueError, match="needs a model of the data's 10 classes, and this one has none"):
        evaluate(unconditional, metrics=Names(["class"]), **options)
    with pytest.raises(ValueError, match=r"guidance 2\.0 needs a class-conditional model"):
        evaluate(unconditional, guidance=Numbers([2.0]), **options)
    with pytest.raises(ValueError, match="ImageFolder has no test pictures"):
        evaluate(
            data=ImageFolder(str(tmp_path), 8), reference_only=True, splits=Names(["test"]), cache=options["cache"]
        )
    assert "give a --checkpoint to sample from, or --images to score" in refusal(capsys)
    assert "give --data, or the --checkpoint" in refusal(capsys, "--reference-only")


def test_a_folder_that_cannot_be_written(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        evaluate(checkpoint, n=4, out=str(tmp_path / "file" / "out"), cache=str(tmp_path / "cache"))


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
def test_world_sizes_agree(checkpoint, tmp_path):
    told = []
    for size in (1, 3):  # 101 images in batches of 60: the third process has none
        out = tmp_path / f"out{size}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--"]
        command += [str(SCRIPT), "--checkpoint", checkpoint, "--n", "101", "--batch-size", "60", "--steps", "3"]
        command += ["--metrics", "fid,recall,class,bpd", "--neighbours", "3", "--save-images", str(out / "images")]
        command += ["--cache", str(tmp_path / f"cache{size}"), "--out", str(out)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        told.append([json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()])
        assert len(list((out / "images" / "heun3-ema-101-seed0").iterdir())) == 101
    for one, three in zip(*told, strict=True):
        assert one["key"] == three["key"]
        assert one.get("images") == three.get("images")
        assert one.get("nfe") == three.get("nfe")
        assert three["scores"] == pytest.approx(one["scores"], rel=1e-6)
