"""A weight of the loss over time that is learned: each time counts by how well it can be predicted at all."""

import math

import torch
from torch import Tensor, nn

from fmlit.core.errors import UserError
from fmlit.flows.paths import GaussianPath
from fmlit.flows.times import SIGMA_MAX, SIGMA_MIN


class LearnedLossWeight(nn.Module):
    """u(t), the log-variance of the loss at time t, learned along with the network.

    ``loss / exp(u) + u`` is least at ``u(t) = ln E[loss | t]``: then every time has the weighted loss 1 in the mean,
    and none drowns the others (Kendall, Gal & Cipolla 2018; over noise levels: Karras et al. 2024, "EDM2", eq. 21).
    u is linear in fixed Fourier features of ``ln(sigma) / 4``, and 0 at first.

    Args:
        features: number of Fourier features.
    """

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        if features < 1:
            raise UserError(f"LearnedLossWeight.features must be at least 1, got {features}")
        generator = torch.Generator().manual_seed(0)  # always the same: all ranks and resumed runs agree
        # Parameters, as buffers would be sent from rank 0 to all others in every step.
        frequencies = 2 * math.pi * torch.randn(features, generator=generator, device="cpu")
        phases = 2 * math.pi * torch.rand(features, generator=generator, device="cpu")
        self.frequencies = nn.Parameter(frequencies, requires_grad=False)
        self.phases = nn.Parameter(phases, requires_grad=False)
        self.output = nn.Linear(features, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, path: GaussianPath, t: Tensor) -> Tensor:
        """u at times t (B,), in float32 whatever the precision of training. Constant outside EDM's noise levels."""
        with torch.autocast(t.device.type, enabled=False):
            level = path.sigma(t.float()).clamp(SIGMA_MIN, SIGMA_MAX).log() / 4  # sigma is 0 or infinite at the ends
            features = math.sqrt(2) * torch.cos(level[:, None] * self.frequencies + self.phases)
            return nn.functional.linear(features, self.output.weight.float(), self.output.bias.float())[:, 0]

    def weigh(self, losses: Tensor, path: GaussianPath, t: Tensor) -> Tensor:
        """``losses / exp(u(t)) + u(t)`` for the losses (B,) at times t (B,)."""
        if losses.shape != t.shape:
            raise UserError(f"one loss per time is needed, got shapes {tuple(losses.shape)} and {tuple(t.shape)}")
        u = self(path, t)
        return losses * torch.exp(-u) + u
