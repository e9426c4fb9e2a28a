"""Scores against reference files: those of pytorch-fid and EDM, of ADM, and our own; and what is refused."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from fmlit import CIFAR10, Digits
from fmlit.cli.evaluate import evaluate
from fmlit.cli.export import export
from fmlit.cli.options import Names, run
from fmlit.cli.reference import reference
from fmlit.cli.score import score
from fmlit.cli.scoring_options import ScoringOptions
from fmlit.core.files import sha256
from fmlit.core.tensors import from_uint8, to_uint8
from fmlit.metrics import InceptionFeatures, PixelFeatures, ReferenceFile, inception
from fmlit.sampling.generate import generate
from fmlit.sampling.samplers import ODESampler
from tests.helpers.known_model import known_model

ROOT = Path(__file__).parents[2]
WEIGHTS = Path(os.environ.get(inception.VARIABLE) or ROOT / inception.DEFAULT)
pytestmark = [
    pytest.mark.filterwarnings("ignore:a Fréchet distance from .* images in 64 dimensions"),
    pytest.mark.filterwarnings("ignore:Matrix is singular"),  # some pixels of the digits are always black
]


def real(split: str = "train") -> torch.Tensor:
    dataset = Digits().dataset(split)
    return dataset.batch(range(len(dataset)))[0]


def moments(images: torch.Tensor) -> dict[str, np.ndarray]:
    pixels = from_uint8(images).flatten(1).double().numpy()
    return {"mu": pixels.mean(axis=0), "sigma": np.cov(pixels, rowvar=False)}


def channels_last(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def textbook_distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The Fréchet distance as pytorch-fid computes it."""
    root = sqrtm(a["sigma"] @ b["sigma"]).real
    return float(((a["mu"] - b["mu"]) ** 2).sum() + np.trace(a["sigma"] + b["sigma"] - 2 * root))


@pytest.fixture
def pictures(tmp_path) -> str:
    np.savez(tmp_path / "test.npz", arr_0=channels_last(real("test")))
    return str(tmp_path / "test.npz")


def pixels(options: dict) -> dict:
    """The options, with pixels as features: files of other programs are taken for Inception's."""
    scoring = ScoringOptions(features="pixels", cache=options["scoring"].cache, batch_size=32)
    return {"out": options["out"], "scoring": scoring}


def test_mean_and_covariance_of_another_program(pictures, options, tmp_path):
    file = tmp_path / "digits-train (all).npz"
    np.savez(file, **moments(real()), mu_s=np.full(3, np.nan), sigma_s=np.zeros((2, 3)))  # those of sFID
    told = score(pictures, metrics=Names(["fid"]), reference=str(file), **pixels(options))["cells"][0]
    expected = textbook_distance(moments(real("test")), moments(real()))
    assert told["scores"] == {"fd_pixels_360": pytest.approx(expected, rel=1e-6)}
    name = f"ref.digits_train__all_.{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"
    assert told["protocol"] == f"fdpixels360-{name}-uint8"
    record = json.loads((Path(options["out"]) / "results.jsonl").read_text())
    assert (record["reference"], record["reference_sha256"]) == (name, sha256(file))
    assert record["data"] == {}


def test_pictures_are_scored_like_the_data_that_they_are(pictures, options, tmp_path):
    np.savez(tmp_path / "train.npz", arr_0=channels_last(real()))
    metrics = Names(["fid", "kid", "precision", "recall"])
    scoring = pixels(options)
    by_file = score(pictures, metrics=metrics, reference=str(tmp_path / "train.npz"), **scoring)["cells"][0]
    by_data = score(
        pictures, metrics=metrics, out=options["out"], scoring=ScoringOptions(Digits(), cache=str(tmp_path / "c"))
    )["cells"][0]
    assert by_file["scores"] == pytest.approx(by_data["scores"], rel=1e-9)
    assert by_file["protocol"] != by_data["protocol"]
    (cached,) = Path(options["scoring"].cache).iterdir()
    assert cached.name.startswith("pixels-ref.train.")


def test_mean_and_covariance_come_before_pictures(pictures, options, tmp_path):
    """ADM's files hold the statistics of a whole training set, and a part of its pictures."""
    np.savez(tmp_path / "adm.npz", arr_0=channels_last(real()[:500]), **moments(real()))
    np.savez(tmp_path / "part.npz", arr_0=channels_last(real()[:500]))
    metrics = Names(["fid", "kid"])
    adm, part = (
        score(pictures, metrics=metrics, reference=str(tmp_path / f"{name}.npz"), **pixels(options))["cells"][0]
        for name in ("adm", "part")
    )
    assert adm["scores"]["kd_pixels_360"] == part["scores"]["kd_pixels_360"]
    expected = textbook_distance(moments(real("test")), moments(real()))
    assert adm["scores"]["fd_pixels_360"] == pytest.approx(expected, rel=1e-6)
    assert part["scores"]["fd_pixels_360"] > 1.01 * expected


def test_a_file_of_our_own_states_its_features(checkpoint, options):
    (path,) = reference(scoring=ScoringOptions(Digits(), cache=options["scoring"].cache))["references"]
    metrics = Names(["fid", "recall", "class"])  # the last of which asks the data
    by_file = evaluate(checkpoint, n=45, metrics=metrics, reference=path, **options)["cells"][0]
    by_data = evaluate(checkpoint, n=45, metrics=metrics, **options)["cells"][0]
    assert by_file["scores"] == by_data["scores"]
    assert f"-{ReferenceFile(path).name}-uint8-ema-" in by_file["protocol"]


def test_an_export_needs_no_data(checkpoint, options, tmp_path):
    export(checkpoint, out=str(tmp_path / "export"))
    np.savez(tmp_path / "train.npz", **moments(real()))
    told = evaluate(
        str(tmp_path / "export"), 45, Names(["fid"]), reference=str(tmp_path / "train.npz"), **pixels(options)
    )
    drawn = to_uint8(torch.cat([x for _, x in generate(known_model(), ODESampler(), 45, seed=0, batch_size=32)]))
    expected = textbook_distance(moments(drawn), moments(real()))
    assert told["cells"][0]["scores"]["fd_pixels_45"] == pytest.approx(expected, rel=1e-4)


class Trap:
    """An object that would write a file if it were unpickled."""

    def __reduce__(self):
        return Path("sprung").touch, ()


def write(content: bytes | dict) -> str:
    if isinstance(content, bytes):
        Path("ref.npz").write_bytes(content)
    else:
        np.savez("ref.npz", **content)
    return "ref.npz"


def refusal(capsys, command, *args: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(command, [str(arg) for arg in args])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


MU, SIGMA = np.zeros(64), np.eye(64)
BENT = SIGMA + np.eye(64, k=1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "ref.npz is not an .npz file"),
        (b"<html>404</html>", "ref.npz is not an .npz file"),
        (pickle.dumps({"mu": Trap()}), "ref.npz is not an .npz file"),
        ({"mu": np.array([Trap()]), "sigma": SIGMA}, "holds pickled objects, which are never opened"),
        ({"arr_0": np.array([Trap()])}, "holds pickled objects, which are never opened"),
        ({"images": MU}, "ref.npz is not a reference: it has neither mu and sigma, nor pictures in arr_0"),
        ({"mu": MU}, "ref.npz is not a reference"),
        ({"mu": MU, "sigma": SIGMA[:63]}, "needs mu (d,) and sigma (d, d), got (64,) and (63, 64)"),
        ({"mu": MU, "sigma": SIGMA[:63, :63]}, "got (64,) and (63, 63)"),
        ({"mu": MU[None], "sigma": SIGMA}, "got (1, 64) and (64, 64)"),
        ({"mu": MU * np.nan, "sigma": SIGMA}, "mu of ref.npz holds NaN"),
        ({"mu": MU, "sigma": np.where(SIGMA, np.inf, 0)}, "sigma of ref.npz holds NaN, infinite values"),
        ({"mu": MU.astype(str), "sigma": SIGMA}, "mu of ref.npz holds NaN, infinite values, or something other"),
        ({"mu": MU, "sigma": BENT}, "sigma of ref.npz is not symmetric"),
        ({"mu": MU, "sigma": -SIGMA}, "sigma of ref.npz has negative variances"),
        ({"mu": MU[:63], "sigma": SIGMA[:63, :63]}, "in 63 dimensions, and pixels features have 64: choose the --feat"),
        ({"arr_0": np.zeros((9, 8, 8, 1))}, "arr_0 of ref.npz must be at least 2 pictures, uint8 (N, H, W, C)"),
        ({"arr_0": np.zeros((9, 1, 8, 8), np.uint8)}, "with C = 1 or 3, got uint8 (9, 1, 8, 8)"),
        ({"arr_0": np.zeros((1, 8, 8, 1), np.uint8)}, "at least 2 pictures"),
        ({"header": np.array("{}"), "mu": MU, "sigma": SIGMA}, "ref.npz does not hold reference statistics"),
    ],
)
def test_files_that_are_no_reference(content, said, checkpoint, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--reference", write(content), "--metrics", "fid", "--features", "pixels", "--out", "out"]
    for command, of in ((evaluate, ("--checkpoint", checkpoint)), (score, ("--images", pictures))):
        assert said in refusal(capsys, command, *of, *options)
    assert not Path("sprung").exists()
    assert not Path("out/results.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ({"mu": MU, "sigma": SIGMA}, "--metrics fid,kid", "metric kid needs the features of single images"),
        ({"mu": MU, "sigma": SIGMA}, "--metrics recall", "metric recall needs the features of single images"),
        ({"mu": MU, "sigma": SIGMA}, "--metrics fid --flip", "--splits and --flip have no effect with --reference"),
        ({"mu": MU, "sigma": SIGMA}, "--metrics fid --splits test", "--splits and --flip have no effect"),
        ({"arr_0": np.zeros((9, 9, 9, 1), np.uint8)}, "--metrics fid", "behind ref.npz are 9x9 pixels, and those to"),
    ],
)
def test_references_that_do_not_fit(content, options, said, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--reference", write(content), "--features", "pixels", "--out", "out", *options.split()]
    assert said in refusal(capsys, evaluate, "--checkpoint", checkpoint, *options)
    assert not Path("out/results.jsonl").exists()


def test_mistakes_that_need_no_file(checkpoint, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "there is no reference file x.npz" in refusal(capsys, score, "--images", pictures, "--reference", "x.npz")
    line = refusal(capsys, evaluate, "--checkpoint", checkpoint, "--reference", "x.npz", "--metrics", "bpd,class")
    assert "--reference has no meaning with --metrics bpd,class" in line
    assert "reference: no such option" in refusal(capsys, reference, "--reference", "x.npz")


def test_features_of_another_network(options, pictures, tmp_path, monkeypatch, capsys):
    """Our own files state their network, even where another has the same dimension."""
    monkeypatch.chdir(tmp_path)
    (path,) = reference(scoring=ScoringOptions(Digits(), cache="cache"))["references"]

    class Halves(PixelFeatures):
        name = "halves"

    with pytest.raises(ValueError, match=r"ref\.pixels_train_.* holds pixels features .* given halves features"):
        score(pictures, reference=path, out="out", scoring=ScoringOptions(features=Halves(), cache="cache"))
    assert not Path("out/results.jsonl").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "data" / "cifar-10-batches-py").is_dir(), reason="CIFAR-10 is not in data/")
@pytest.mark.skipif(not WEIGHTS.is_file(), reason="the FID Inception weights are not here")
@pytest.mark.filterwarnings("ignore:a Fréchet distance from 64 images")
def test_inception_statistics_of_cifar10(options, tmp_path):
    """64 test images against the statistics of 64 training images. The oracle takes scipy's root of a 64 x 64 matrix.

    With n centered features X, A = X^T X / (n - 1), and A B has the eigenvalues of X B X^T / (n - 1), and zeros.
    """
    network = InceptionFeatures(str(WEIGHTS))
    images = {split: CIFAR10(root=str(ROOT / "data")).dataset(split).batch(range(64))[0] for split in ("train", "test")}
    rows = {split: network(pictures).double().numpy() for split, pictures in images.items()}
    mu, sigma = rows["train"].mean(axis=0), np.cov(rows["train"], rowvar=False)
    np.savez(tmp_path / "cifar10_train.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "test.npz", arr_0=channels_last(images["test"]))
    told = score(
        str(tmp_path / "test.npz"),
        metrics=Names(["fid"]),
        reference=str(tmp_path / "cifar10_train.npz"),
        out=options["out"],
        scoring=ScoringOptions(features=network, cache=str(tmp_path / "cache")),
    )["cells"][0]
    x = rows["test"] - rows["test"].mean(axis=0)
    root = sqrtm(x @ sigma @ x.T / 63).real.trace()
    expected = ((rows["test"].mean(axis=0) - mu) ** 2).sum() + (x**2).sum() / 63 + sigma.trace() - 2 * root
    assert told["scores"]["fid_64"] == pytest.approx(expected, rel=1e-5)
    assert told["protocol"].startswith("fid64-ref.cifar10_train.")
    assert told["protocol"].endswith("-tf1resize-uint8")
