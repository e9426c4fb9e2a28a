"""The numbers of ``scripts/score.py`` against those of the established tools, on the same files.

Pieces of the two photographs that ship inside scikit-learn, as PNGs; minutes on a CPU, and only where FMLIT_INCEPTION
names the weights. The same comparison on 4,096 images is in docs/scoring.md.
"""

import os

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from fmlit import ImageFolder
from fmlit.cli.options import Names
from fmlit.cli.score import score
from fmlit.cli.scoring_options import ScoringOptions
from fmlit.data.image_files import save_pngs
from fmlit.metrics import InceptionFeatures, inception

WEIGHTS = os.environ.get(inception.VARIABLE)
N = 100
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WEIGHTS, reason=f"{inception.VARIABLE} does not name the FID Inception weights"),
    pytest.mark.filterwarnings("ignore:a Fréchet distance from 100 images", "ignore:.*save all extracted features"),
]


@pytest.fixture(scope="module")
def pictures() -> list[torch.Tensor]:
    """Two sets of uint8 (100, 3, 32, 32), from the two photographs in different shares."""
    places = np.random.default_rng(0)
    photographs = [torch.tensor(photograph).permute(2, 0, 1) for photograph in load_sample_images().images]

    def pieces(photograph: torch.Tensor, count: int) -> list[torch.Tensor]:
        corners = places.integers(0, (427 - 32, 640 - 32), (count, 2))
        return [photograph[:, y : y + 32, x : x + 32] for y, x in corners.tolist()]

    shares = ((70, 30), (40, 60))
    return [torch.stack(pieces(photographs[0], a) + pieces(photographs[1], b)) for a, b in shares]


@pytest.fixture(scope="module")
def folders(pictures, tmp_path_factory) -> list[str]:
    made = [tmp_path_factory.mktemp(name) for name in ("generated", "real")]
    for folder, images in zip(made, pictures, strict=True):
        save_pngs(folder, images)
    return [str(folder) for folder in made]


@pytest.fixture(scope="module")
def ours(folders, tmp_path_factory) -> dict[str, float]:
    generated, real = folders
    work = tmp_path_factory.mktemp("work")
    told = score(
        generated,
        metrics=Names(["fid", "kid", "precision", "recall"]),
        scoring=ScoringOptions(ImageFolder(real, 32), "inception", cache=str(work / "cache")),
        out=str(work / "out"),
    )
    (cell,) = told["cells"]
    assert cell["protocol"] == "fid100-train-tf1resize-uint8"
    assert 0.1 < cell["scores"]["precision_100"] < 0.9
    assert 0.1 < cell["scores"]["recall_100"] < 0.9
    return cell["scores"]


def test_torch_fidelity_finds_the_same(ours, folders):
    from torch_fidelity import calculate_metrics

    theirs = calculate_metrics(
        input1=folders[0], input2=folders[1], fid=True, kid=True, kid_subsets=1, kid_subset_size=N, prc=True,
        feature_extractor="inception-v3-compat",  # for precision and recall its default is another network
        feature_extractor_weights_path=WEIGHTS, cuda=False, save_cpu_ram=True, cache=False, verbose=False,
    )  # fmt: skip
    assert ours["fid_100"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["kid_100"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)  # one subset of all
    assert ours["precision_100"] == pytest.approx(theirs["precision"])
    assert ours["recall_100"] == pytest.approx(theirs["recall"])


@pytest.mark.parametrize("antialias", [False, True])
def test_torchmetrics_finds_the_same_but_not_by_default(antialias, ours, pictures):
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(antialias=antialias, feature_extractor_weights_path=WEIGHTS)
    for images, real in zip(pictures, (False, True), strict=True):
        for batch in images.split(20):
            metric.update(batch, real=real)
    apart = abs(metric.compute().item() / ours["fid_100"] - 1)
    assert apart > 0.01 if antialias else apart < 1e-3


def test_clean_fid_finds_the_same_from_the_same_network(ours, folders):
    """Its mode of TensorFlow, which resizes inside the network; all but the network is its own."""
    fid = pytest.importorskip("cleanfid.fid", reason="clean-fid is not installed")
    network = InceptionFeatures(WEIGHTS)
    theirs = fid.compute_fid(
        *folders, mode="legacy_tensorflow", custom_feat_extractor=lambda x: network(x.round().to(torch.uint8)),
        num_workers=0, device=torch.device("cpu"), use_dataparallel=False, verbose=False,
    )  # fmt: skip
    assert ours["fid_100"] == pytest.approx(theirs, rel=1e-3)
