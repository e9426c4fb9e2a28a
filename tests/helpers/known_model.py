"""A model whose samples and likelihood are known in closed form, as the checkpoint of a run.

A network that returns 0, preconditioned for data of standard deviation 1/2, follows the exact velocity of N(0, 1/4):
the sample of noise eps is eps / 2, on every path.
"""

from pathlib import Path

import torch

from fmlit import DataModule, Digits
from fmlit.flows.paths import CondOTPath, GaussianPath
from fmlit.flows.predictions import PreconditionedVelocity
from fmlit.models.generative_model import GenerativeModel
from fmlit.models.mlp import MLP
from fmlit.storage.checkpoints import AtomicCheckpointIO
from fmlit.storage.descriptions import describe

STD = 0.5


def known_model(shape=(1, 8, 8), num_classes: int | None = 10, path: GaussianPath = CondOTPath()) -> GenerativeModel:
    net = MLP(shape, num_classes, width=8, depth=1)
    torch.nn.init.zeros_(net.outputs[-1].weight)
    torch.nn.init.zeros_(net.outputs[-1].bias)
    return GenerativeModel(net, path, PreconditionedVelocity(STD), shape, num_classes)


def save_run(folder: Path, model: GenerativeModel, data: DataModule | None = None) -> Path:
    """A run folder as training leaves it; the raw weights are those of the model plus 1."""
    averaged = model.net.state_dict()
    checkpoint = {
        "state_dict": {f"model.net.{name}": value + 1 for name, value in averaged.items()},
        "ema": {"ema_500": averaged},
        "model_description": describe(model),
        "data_description": describe(data or Digits()),
        "images_seen": 1280,
        "global_step": 10,
    }
    AtomicCheckpointIO().save_checkpoint(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder
