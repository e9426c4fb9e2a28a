"""A learned weight of the loss over time, which balances times that are easy and hard to predict.

References:
    Kendall, Gal & Cipolla 2018, "Multi-Task Learning Using Uncertainty", https://arxiv.org/abs/1705.07115
    Karras et al. 2024, "Analyzing and Improving the Training Dynamics" (EDM2), https://arxiv.org/abs/2312.02696
"""

import math

import torch
from torch import Tensor, nn

from fmlit.core.errors import UserError
from fmlit.flows.paths import GaussianPath
from fmlit.flows.times import SIGMA_MAX, SIGMA_MIN


class LearnedLossWeight(nn.Module):
    """The log-variance u(t) of the loss at time t, learned together with the network.

    The weighted loss ``loss / exp(u) + u`` is least at ``u(t) = ln E[loss | t]``. Then the mean weighted loss is 1 at
    every time, and no time dominates the others (Kendall et al. 2018; for noise levels, Karras et al. 2024, equation
    21). u is linear in fixed Fourier features of ``ln(sigma) / 4``, and it starts at 0.

    Args:
        features: number of Fourier features.
    """

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        if features < 1:
            raise UserError(f"LearnedLossWeight.features must be at least 1, got {features}")
        generator = torch.Generator().manual_seed(0)  # the same on all ranks and in resumed runs
        # Parameters, because DDP would broadcast buffers in every step.
        frequencies = 2 * math.pi * torch.randn(features, generator=generator, device="cpu")
        phases = 2 * math.pi * torch.rand(features, generator=generator, device="cpu")
        self.frequencies = nn.Parameter(frequencies, requires_grad=False)
        self.phases = nn.Parameter(phases, requires_grad=False)
        self.output = nn.Linear(features, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, path: GaussianPath, t: Tensor) -> Tensor:
        """Return u at times t (B,). Always in float32. Constant outside EDM's range of noise levels."""
        with torch.autocast(t.device.type, enabled=False):
            level = path.sigma(t.float()).clamp(SIGMA_MIN, SIGMA_MAX).log() / 4  # sigma is 0 or infinite at the ends
            features = math.sqrt(2) * torch.cos(level[:, None] * self.frequencies + self.phases)
            return nn.functional.linear(features, self.output.weight.float(), self.output.bias.float())[:, 0]

    def weigh(self, losses: Tensor, path: GaussianPath, t: Tensor) -> Tensor:
        """Return ``losses / exp(u(t)) + u(t)`` for losses (B,) at times t (B,)."""
        if losses.shape != t.shape:
            raise UserError(f"one loss per time is needed, got shapes {tuple(losses.shape)} and {tuple(t.shape)}")
        u = self(path, t)
        return losses * torch.exp(-u) + u
