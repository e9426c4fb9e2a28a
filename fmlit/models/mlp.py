"""A multilayer perceptron for vectors."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from fmlit.core.errors import UserError
from fmlit.models.time_embedding import time_embedding


class MLP(nn.Module):
    """A residual multilayer perceptron for vectors. A positional embedding conditions it on time.

    Args:
        shape: shape of one data point, (dimension,). Any other shape is flattened.
        num_classes: number of classes, or None for an unconditional network.
        width: hidden width.
        depth: number of residual blocks.
    """

    def __init__(self, shape: Sequence[int], num_classes: int | None = None, width: int = 256, depth: int = 3) -> None:
        super().__init__()
        if width < 2 or width % 2 or depth < 1:
            raise UserError(f"MLP needs an even width and a depth of at least 1, got width {width} and depth {depth}")
        self.shape, self.num_classes, self.width, self.depth = tuple(shape), num_classes, width, depth
        dimension = math.prod(self.shape)
        self.inputs = nn.Linear(dimension, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.outputs = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dimension))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        condition = self.time(time_embedding(t, self.width).to(self.inputs.weight.dtype))
        if self.label is not None:
            condition = condition + self.label(labels)
        hidden = self.inputs(x.flatten(1))
        for layer in self.layers:
            hidden = hidden + layer(hidden + condition)
        return self.outputs(hidden).unflatten(1, self.shape)
