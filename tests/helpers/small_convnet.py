"""A small network with kernels and a matrix for Muon and with everything that is AdamW's, and how it is trained."""

import torch
from torch import nn


class ConvNet(nn.Module):
    """Hidden matrices of two shapes: two kernels of (16, 144), one of (24, 16)."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(2, 16, 3, padding=1)
        self.hidden = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(4, 16)
        self.wide = nn.Conv2d(16, 24, 1)
        self.last = nn.Conv2d(24, 2, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        for layer in self.hidden:
            x = x + layer(nn.functional.silu(self.norm(x)))
        return self.last(nn.functional.silu(self.wide(x)))


def backward(net, step):
    """Gradients of a batch that ``step`` decides."""
    net.zero_grad()
    generator = torch.Generator().manual_seed(step)
    net(torch.randn(4, 2, 6, 6, generator=generator)).square().mean().backward()


def train(net, optimizer, steps):
    for step in steps:
        backward(net, step)
        optimizer.step()


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
