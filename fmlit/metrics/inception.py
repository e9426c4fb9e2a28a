"""The Inception network of 2015 behind every published FID, with the resize of TensorFlow 1."""

import functools
import io
import os
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from fmlit.core.errors import UserError
from fmlit.core.files import expand
from fmlit.metrics.features import Features, read_weights, weights_digest

VARIABLE = "FMLIT_INCEPTION"
DEFAULT = Path("weights/inception.pth")
# The first features of a test image, which tell the network of 2015 from one of the same shape with other weights.
PROBE = (0.2887, 0.5375, 0.1259, 0.1339, 0.0876, 0.2861, 0.1795, 0.0525)


class InceptionFeatures(Features):
    """The 2048 pooled features of FID (Heusel et al. 2017), by torch-fidelity's port of the original network.

    Gray images are repeated to RGB. Logits are not used, and the weights file need not have them. Weights are read, and
    fetched if need be, at the first use or ``to``: a recipe whose metrics are switched off needs none.

    Args:
        weights: a file of torch-fidelity's (or pytorch-fid's) ``weights-inception-2015-12-05``; by default the one that
            the environment variable FMLIT_INCEPTION names, else ``weights/inception.pth`` if there is one, else
            torch-fidelity's own download, once.

    Raises:
        UserError: at the first use: the file is missing, or holds something else, or cannot be downloaded.
    """

    name = "inception"
    dimension = 2048
    preprocessing = "tf1resize"

    def __init__(self, weights: str | None = None) -> None:
        self.weights = weights
        self._path = weights or os.environ.get(VARIABLE) or (str(DEFAULT) if DEFAULT.is_file() else None)

    @functools.cached_property
    def _loaded(self) -> tuple[nn.Module, str]:
        """The network and the digest of those of its weights that are used."""
        if self._path and not expand(self._path).is_file():
            raise UserError(f"no Inception weights file {self._path} (InceptionFeatures.weights, or ${VARIABLE})")
        state, origin = (read_weights(self._path), self._path) if self._path else _download()
        network = _build(state, origin)
        image = (torch.arange(3 * 32 * 32) % 251).to(torch.uint8).reshape(1, 3, 32, 32)
        if not torch.allclose(network(image)[0][0, : len(PROBE)], torch.tensor(PROBE), atol=0.01):
            raise UserError(f"{origin} holds an Inception network, but not the one of 2015 that FID is defined by")
        used = {k: v for k, v in state.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
        # Twice as fast on a CPU as the default layout; features differ by rounding errors (6e-6, of 0.27 on average).
        return network.to(memory_format=torch.channels_last), weights_digest(used)

    @property
    def fingerprint(self) -> str:
        return self._loaded[1]

    def to(self, device: torch.device | str) -> Self:
        self._loaded[0].to(device)
        return super().to(device)

    def extract(self, images: Tensor) -> Tensor:
        return torch.cat([self._loaded[0](chunk)[0] for chunk in self.rgb_chunks(images)])


def _download() -> tuple[dict[str, Tensor], str]:
    """torch-fidelity's weights through torch.hub's cache, checked by the hash in their name."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    try:
        state = torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the FID Inception weights cannot be downloaded ({error}): fetch {URL_INCEPTION_V3} on a machine with "
            f"network and put it at {DEFAULT}, or name it by InceptionFeatures.weights or ${VARIABLE}"
        ) from error
    return state, URL_INCEPTION_V3


def _build(state: dict[str, Tensor], origin: str) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity unpickles its file without weights_only: it gets a copy of what was read with it.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # layers are initialized before they are loaded
            return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer)
    except RuntimeError as error:  # missing, unexpected or misshapen tensors
        raise UserError(f"{origin} does not hold the weights of the FID Inception network of 2015") from error
