"""The positional embedding of time that the networks share."""

import math

import torch
from torch import Tensor

TIME_SCALE = 1000.0  # positional embeddings were made for step numbers 0 ... 1000


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Embed times (B,) as (B, width) sines and cosines.

    Frequencies run from 1 to 1e-4 per unit of ``TIME_SCALE * t``.
    """
    frequencies = torch.exp(torch.linspace(0, -math.log(1e4), width // 2, dtype=torch.float32, device=t.device))
    angles = TIME_SCALE * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
