"""``~`` and ``$VAR`` in every option that is a path."""

import os

import numpy as np
import pytest
from PIL import Image

import fmlit
from fmlit import MNIST, ImageFolder, InceptionFeatures
from fmlit.cli.evaluate import evaluate
from fmlit.cli.export import export
from fmlit.cli.options import Names
from fmlit.cli.sample import OutputFiles, SamplerOptions, sample
from fmlit.cli.score import score
from fmlit.cli.scoring_options import ScoringOptions
from tests.helpers.known_model import known_model, save_run
from tests.helpers.tiny_cli import train

pytestmark = pytest.mark.filterwarnings("ignore:a Fréchet distance from .. images in 64 dimensions")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a run in it, and another working directory, which must stay empty."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    save_run(tmp_path / "home" / "run", known_model())
    yield tmp_path / "home"
    assert os.listdir() == []


def test_in_commands_that_use_a_model(home):
    files = OutputFiles("~/a.png", save_images="$SCRATCH/a.npz", trajectory="${SCRATCH}/a.gif")
    few = SamplerOptions(steps=2, guide="~/run", guidance=1.5)
    written = sample("~/run", n=4, sampler=few, files=files)
    assert written["picture"] == str(home / "a.png")
    assert {path.name for path in (home.parent / "scratch").iterdir()} == {"a.npz", "a.gif"}
    export("$HOME/run", out="~/exported")
    assert fmlit.load("~/exported").shape == (1, 8, 8)
    scoring = ScoringOptions(cache="~/cache", features="pixels")
    evaluate("~/run", n=20, metrics=Names(["fid"]), out="$SCRATCH/scores", scoring=scoring)
    score("$SCRATCH/a.npz", "~/run", Names(["fid"]), out="~/scores", scoring=scoring)
    mean, covariance = np.zeros(64), np.eye(64)
    np.savez(home / "reference.npz", mu=mean, sigma=covariance)
    score("$SCRATCH/a.npz", metrics=Names(["fid"]), reference="~/reference.npz", out="~/more", scoring=scoring)
    assert {path.name for path in home.iterdir()} >= {"cache", "scores", "more", "exported"}


def test_in_data_and_metrics(home):
    (home / "pictures" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(home / "pictures" / "cat" / "a.png")
    folder = ImageFolder("~/pictures", 8, test_root="$HOME/pictures")
    assert len(folder.dataset("train")) == len(folder.dataset("test")) == 1
    assert folder.root == "~/pictures"  # as a recipe says it
    assert folder.class_names == ["cat"]
    with pytest.raises(FileNotFoundError, match=f"there is no folder {home}/data/MNIST"):
        MNIST(root="~/data", download=False)
    with pytest.raises(fmlit.UserError, match=r"data.root: \$NOT_SET in \$NOT_SET/x is unknown"):
        ImageFolder("$NOT_SET/x", 8)
    (home / "weights.pth").write_bytes(b"none")
    with pytest.raises(fmlit.UserError, match=f"{home}/weights.pth"):
        _ = InceptionFeatures("~/weights.pth").fingerprint


def test_in_training(home, tmp_path):
    outcome = train(tmp_path, "--start_from=~/nothing")
    assert f"start_from: there is no checkpoint {home}/nothing" in outcome.error
