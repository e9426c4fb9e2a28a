"""``scripts/score.py`` and ``scripts/reference.py``: numbers and statistics equal those of ``evaluate.py``."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fmlit import Digits
from fmlit.cli.evaluate import Sweep, evaluate
from fmlit.cli.options import Integers, Names
from fmlit.cli.reference import reference
from fmlit.cli.score import score
from fmlit.cli.scoring_options import ScoringOptions
from fmlit.core.tensors import to_uint8
from fmlit.data.image_files import read_images, save_npz
from fmlit.sampling.generate import generate
from fmlit.sampling.samplers import ODESampler
from tests.helpers.known_model import known_model

pytestmark = pytest.mark.filterwarnings("ignore:a Fréchet distance from .. images in 64 dimensions")
SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_pictures_score_like_the_samples_that_they_are(checkpoint, options, tmp_path):
    folder = tmp_path / "pictures"
    sweep = Sweep(steps=Integers([3]), save_images=str(folder))
    told = evaluate(checkpoint, n=45, sweep=sweep, **options)["cells"][0]
    (pictures,) = folder.iterdir()
    assert pictures.name == "heun3-ema-45-seed0"
    sampler = ODESampler("heun", 3)
    drawn = to_uint8(torch.cat([x for _, x in generate(known_model(), sampler, 45, seed=0, batch_size=32)]))
    assert torch.equal(read_images(str(pictures), (1, 8, 8)).batch(range(45))[0], drawn)
    with open(tmp_path / "x.npz", "wb") as file:
        save_npz(file, drawn)
    for path in (str(pictures), str(tmp_path / "x.npz")):
        read = score(path, checkpoint, Names(["kid", "fid"]), **options)["cells"][0]
        assert read["scores"]["fd_pixels_45"] == pytest.approx(told["scores"]["fd_pixels_45"], rel=1e-12)
        assert read["protocol"] == "fdpixels45-train-uint8"
    # The scores are known, but the pictures are not in the new folder.
    evaluate(checkpoint, n=45, sweep=replace(sweep, save_images=str(tmp_path / "again")), **options)
    assert len(list((tmp_path / "again" / pictures.name).iterdir())) == 45


def test_statistics_alone(options):
    cache = options["scoring"].cache
    told = reference(scoring=ScoringOptions(Digits(), splits=Names(["train", "test"]), cache=cache))
    assert [Path(path).name.split("-")[1] for path in told["references"]] == ["train", "test"]
    assert sorted(map(str, Path(cache).iterdir())) == sorted(told["references"])
    assert not Path(options["out"]).exists()


def output(monkeypatch, capsys, script: str, *args: object) -> dict:
    """The last line that a script prints."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_both_scripts(checkpoint, tmp_path, monkeypatch, capsys):
    """Statistics that one has computed serve the other, whether the data are named or those of a checkpoint."""
    images, cache = Digits().dataset("test").batch(range(90))[0], tmp_path / "cache"
    with open(tmp_path / "x.npz", "wb") as file:
        save_npz(file, images)
    (path,) = output(monkeypatch, capsys, "reference.py", "--checkpoint", checkpoint, "--flip", "--cache", cache)[
        "references"
    ]
    written = Path(path).stat().st_mtime_ns
    args = ["--images", tmp_path / "x.npz", "--data", "Digits", "--flip", "--cache", cache, "--out", tmp_path / "out"]
    told = output(monkeypatch, capsys, "score.py", *args, "--metrics", "recall,fid")
    assert list(told["cells"][0]["scores"]) == ["fd_pixels_90", "recall_pixels_90"]
    assert told["cells"][0]["protocol"] == "fdpixels90-train+flip-uint8"
    assert told["plot"] is None
    assert [str(file) for file in cache.iterdir()] == [path]
    assert Path(path).stat().st_mtime_ns == written
