"""The keys of results.jsonl: results of before are found again. A key that changes here makes users compute anew."""

from pathlib import Path

import pytest
import torch

from fmlit import Digits
from fmlit.data.image_files import save_npz
from fmlit.evaluation.measurements import ImageMeasurement, LikelihoodMeasurement, SampleMeasurement, ScoredModel
from fmlit.evaluation.results import Measurement, Results, _key
from fmlit.evaluation.scoring import Scorer
from fmlit.flows.diffusions import ReverseDiffusion
from fmlit.metrics import PixelFeatures
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.grids import UniformGrid
from fmlit.sampling.samplers import ChurnSampler, ODESampler, Sampler, SDESampler
from tests.helpers.known_model import known_model

BOTH = ("train", "test")


def constant(value: float) -> GenerativeModel:
    """A model whose weights are the same on every machine."""
    model = known_model()
    for parameter in model.net.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


def scorer(*metrics: str, splits=("train",), flip=False, batch_size=32) -> Scorer:
    return Scorer(Digits(), metrics, PixelFeatures(), splits, flip, batch_size=batch_size)


def samples(sampler: Sampler) -> Measurement:
    scored = ScoredModel(constant(0.25), "ema", scorer("fid", "kid"), 70, 0)
    return SampleMeasurement(scored, sampler, Path("out"))


def guided() -> ScoredModel:
    everything = scorer("fid", "recall", "class", "bpd", splits=BOTH, flip=True, batch_size=40)
    return ScoredModel(constant(0.25), "raw", everything, 41, 3, constant(0.5))


def pictures(*metrics: str, **settings) -> Measurement:
    with open("pictures.npz", "wb") as file:
        save_npz(file, torch.arange(3 * 64).to(torch.uint8).reshape(3, 1, 8, 8))
    return ImageMeasurement(scorer(*metrics, **settings), "pictures.npz")


@pytest.mark.parametrize(
    ("measurement", "key"),
    [
        (lambda: samples(ODESampler("heun", 3)), "f926909f63dac903"),
        (lambda: samples(ODESampler("unipc", 5, UniformGrid(), guidance=1.5)), "24f486e5a9b25dee"),
        (lambda: samples(SDESampler(steps=7, sigma=ReverseDiffusion())), "194309524393e9d4"),
        (lambda: samples(ChurnSampler()), "76b97d2d6a00aa5a"),
        (lambda: SampleMeasurement(guided(), ODESampler("heun", 6, guidance=2.0), Path("out")), "bd94783a43403671"),
        (lambda: LikelihoodMeasurement(guided()), "4f5b80312c44d596"),
        (lambda: LikelihoodMeasurement(ScoredModel(constant(0.25), "ema", scorer("bpd"), 5, 0)), "127f4b3f8b986ae0"),
        (lambda: pictures("fid", "kid"), "8b12a03119427a0d"),
        (
            lambda: pictures("fid", "kid", "precision", "recall", splits=BOTH, flip=True, batch_size=40),
            "f177713f9913fcf5",
        ),
    ],
)
def test_keys_of_before(measurement, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _key(measurement().identity) == key


class Counted(Measurement):
    """A measurement that counts how often it is taken."""

    def __init__(self, name: str, *files: Path) -> None:
        self.identity, self.files, self.taken = {"name": name}, files, 0

    def measure(self):
        self.taken += 1
        for file in self.files:
            file.touch()
        return {"scores": {"fid_5": 2.0 * self.taken}, "seconds": 1}


def test_only_what_is_missing_is_measured(tmp_path, capsys):
    results, plain, drawing = Results(tmp_path / "new"), Counted("plain"), Counted("drawing", tmp_path / "picture.png")
    ranks = scorer("fid").ranks
    first = results.complete([plain, drawing], ranks)
    assert [record["scores"]["fid_5"] for record in first] == [2.0, 2.0]
    assert Results(tmp_path / "new").complete([drawing, plain], ranks) == [first[1], first[0]]
    assert (plain.taken, drawing.taken) == (1, 1)
    (tmp_path / "picture.png").unlink()
    capsys.readouterr()
    assert [record["scores"]["fid_5"] for record in results.complete([plain, drawing], ranks)] == [2.0, 4.0]
    assert capsys.readouterr().out == "plain: fid_5 2  (known)\ndrawing: fid_5 4  (1 s)\n"
    assert results.complete([drawing], ranks)[0]["scores"] == {"fid_5": 4.0}  # the newest line counts
