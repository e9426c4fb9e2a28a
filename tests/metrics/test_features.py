"""Features: what they accept, what they leave alone, and which files of weights."""

import os
import urllib.error
from collections import OrderedDict

import pytest
import torch
from torch import nn

from fmlit.metrics import InceptionFeatures, NetworkFeatures, PixelFeatures, inception

WEIGHTS = os.environ.get(inception.VARIABLE)
needs_weights = pytest.mark.skipif(not WEIGHTS, reason=f"{inception.VARIABLE} does not name the FID Inception weights")


def noise(n: int, channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)
    )


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A working directory without weights, and no variable that names any."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    return tmp_path


def precisions() -> list[str]:
    at = torch.backends
    products = (at.cudnn.conv, at.cuda.matmul, at.mkldnn.matmul, at.mkldnn.conv)
    return [product.fp32_precision for product in products]


class Recorder(nn.Module):
    """Notes under which settings it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 5)

    def forward(self, images):
        self.seen = {
            "autocast": torch.is_autocast_enabled("cpu"),
            "products": precisions(),
            "gradients": torch.is_grad_enabled(),
            "training": self.training,
            "range": (images.min().item(), images.max().item()),
        }
        return self.linear(images.flatten(1))


def test_pixels_are_themselves():
    features = PixelFeatures()
    assert features.dimension is None
    images = torch.tensor([0, 255, 51, 204], dtype=torch.uint8).reshape(1, 1, 2, 2)
    torch.testing.assert_close(features(images), torch.tensor([[-1.0, 1.0, -0.6, 0.6]]))
    assert features.dimension == 4


def test_features_are_float32_without_autocast_tf32_and_gradients():
    network = Recorder().train()
    features = NetworkFeatures(network, "recorder")
    torch.set_float32_matmul_precision("medium")
    try:
        before = precisions()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert network.linear(torch.zeros(1, 192)).dtype == torch.bfloat16  # autocast would have changed them
            values = features(noise(4))
        assert precisions() == before  # training goes on as it did
    finally:
        torch.set_float32_matmul_precision("highest")
    assert before[1:3] == ["tf32", "bf16"]
    assert values.dtype == torch.float32
    assert not values.requires_grad
    assert network.seen == {
        "autocast": False,
        "products": ["ieee"] * 4,
        "gradients": False,
        "training": False,
        "range": (-1.0, 1.0),
    }
    assert features.dimension == 5


def test_fingerprint_follows_the_weights():
    network = Recorder()
    before = NetworkFeatures(network, "recorder").fingerprint
    assert before == NetworkFeatures(network, "recorder").fingerprint
    with torch.no_grad():
        network.linear.bias[0] += 1e-6
    assert before != NetworkFeatures(network, "recorder").fingerprint


@pytest.mark.parametrize("name", ["", "Dino", "dino-v2", "inception", "pixels", "2048"])
def test_network_features_need_a_name_of_their_own(name):
    with pytest.raises(ValueError, match=f"got '{name}'"):
        NetworkFeatures(Recorder(), name)


def test_features_refuse_what_is_no_image():
    with pytest.raises(ValueError, match="expected uint8 images"):
        PixelFeatures()(noise(2).float())
    with pytest.raises(ValueError, match=r"expected uint8 images .* \(3, 8, 8\)"):
        PixelFeatures()(noise(2)[0])
    with pytest.raises(ValueError, match=r"unpooled features of 2 images have shape \(2, 3, 8, 8\)"):
        NetworkFeatures(nn.Identity(), "unpooled")(noise(2))
    broken = Recorder()
    nn.init.constant_(broken.linear.weight, torch.nan)
    with pytest.raises(ValueError, match=r"broken features .* NaN"):
        NetworkFeatures(broken, "broken")(noise(2))


def test_weights_that_are_missing_are_named(nowhere, monkeypatch):
    with pytest.raises(ValueError, match=r"no Inception weights file /no/such\.pth"):
        InceptionFeatures("/no/such.pth").to("cpu")
    monkeypatch.setenv(inception.VARIABLE, "/not/here.pth")
    with pytest.raises(ValueError, match=r"no Inception weights file /not/here\.pth .*\$FMLIT_INCEPTION"):
        InceptionFeatures().to("cpu")


def test_without_network_one_line_says_how_to_bring_the_weights(nowhere, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    InceptionFeatures()  # never used: never loaded
    InceptionFeatures("/no/such.pth")
    with pytest.raises(ValueError, match="cannot be downloaded") as caught:
        InceptionFeatures().to("cpu")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("name resolution", "weights-inception-2015-12-05-6726825d.pth", "weights/inception.pth", "$FMLIT_INC"):
        assert part in message


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def _random_inception() -> nn.Module:
    """torch-fidelity's network with random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            return None

    return Random("inception-v3-compat", ["2048"], feature_extractor_weights_path=os.devnull)


def test_files_that_are_something_else_are_refused_by_name(nowhere, monkeypatch):
    path = nowhere / "weights" / "inception.pth"  # the default place is looked at, too
    path.parent.mkdir()
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"weights/inception\.pth is not a weights file"):
        InceptionFeatures().to("cpu")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights/inception\.pth is not a weights file: EOFError"):
        InceptionFeatures().to("cpu")
    torch.save({"weight": torch.zeros(300)}, path)
    path.write_bytes(path.read_bytes()[:900])  # half a download
    with pytest.raises(ValueError, match=r"weights/inception\.pth is not a weights file: .*zip archive") as caught:
        InceptionFeatures().to("cpu")
    assert "\n" not in str(caught.value)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="is not a state dict, names and tensors, but list"):
        InceptionFeatures(str(path)).fingerprint  # noqa: B018
    torch.save(OrderedDict(weight=torch.zeros(3)), path)
    with pytest.raises(ValueError, match=r"inception\.pth does not hold the weights of the FID Inception network"):
        InceptionFeatures(str(path)).fingerprint  # noqa: B018
    torch.save({"weight": Payload()}, path)
    with pytest.raises(ValueError, match=r"inception\.pth is not a weights file"):
        InceptionFeatures(str(path)).fingerprint  # noqa: B018
    assert not (nowhere / "executed").exists()


def test_an_inception_network_of_other_weights_is_refused(nowhere, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: {})
    network = _random_inception()
    monkeypatch.undo()
    path = nowhere / "other.pth"
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match=r"other\.pth holds an Inception network, but not the one of 2015"):
        InceptionFeatures(str(path)).fingerprint  # noqa: B018


@needs_weights
def test_inception_leaves_the_global_generator_alone_and_repeats_gray():
    state = torch.get_rng_state()
    features = InceptionFeatures().to("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert (features.name, features.preprocessing, features.dimension) == ("inception", "tf1resize", 2048)
    gray = noise(2, channels=1, size=32)
    torch.testing.assert_close(features(gray), features(gray.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="gray or RGB images, got 4 channels"):
        features(noise(2, channels=4))
