"""Networks ``net(x, t, labels)``: what is trained. x (B, *shape), t (B,) in [0, 1], labels int64 (B,) or None.

A network is built from the ``shape`` of its data and the number of classes; with classes it embeds one label more, the
null label ``num_classes``, which stands for "unconditional".
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

TIME_SCALE = 1000.0  # positional embeddings were made for step numbers 0 ... 1000


class UNet(nn.Module):
    """``diffusers.UNet2DModel``, configured as the field's U-Net for small images; the defaults are CIFAR-10's.

    Equal to the network of torchcfm and of "Improved DDPM" (Nichol & Dhariwal 2021) in shape, parameters and
    initialisation: last convolution of every residual branch zero, so that training starts from the identity.

    Args:
        shape: (channels, height, width) of the images; the sides must be divisible by 2^(levels - 1).
        num_classes: number of classes, or None for an unconditional network.
        channels: width of the first level.
        multipliers: width of each level as a multiple of ``channels``; the resolution halves between levels.
        blocks: residual blocks per level.
        attention: resolutions (heights in pixels) at which self-attention is used.
        head_channels: channels of one attention head.
        dropout: dropout probability in the residual blocks.
        scale_shift: time and label scale and shift normalised activations (Dhariwal & Nichol 2021, "adaptive group
            normalisation") instead of being added to them.
        norm_groups: groups of the group normalisations; by default 32, or fewer where a group would have less than 4
            channels.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int | None = None,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16,),
        head_channels: int = 64,
        dropout: float = 0.1,
        scale_shift: bool = False,
        norm_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.num_classes = tuple(shape), num_classes
        self.scale_shift = scale_shift
        # The number, not the default: a checkpoint keeps it should the rule ever change, which no shape would tell.
        self.norm_groups = _norm_groups(channels) if norm_groups is None else norm_groups
        self.channels, self.multipliers, self.blocks = channels, tuple(multipliers), blocks
        self.attention, self.head_channels, self.dropout = tuple(attention), head_channels, dropout
        _check_unet(self)

        from diffusers import UNet2DModel  # seconds to import, and only needed when a U-Net is really built

        height = self.shape[1]
        with_attention = [height // 2**level in self.attention for level in range(len(self.multipliers))]
        unet = UNet2DModel(
            sample_size=self.shape[1:],
            in_channels=self.shape[0],
            out_channels=self.shape[0],
            block_out_channels=tuple(channels * m for m in self.multipliers),
            layers_per_block=blocks,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in with_attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(with_attention)),
            attention_head_dim=head_channels,
            norm_num_groups=self.norm_groups,
            dropout=dropout,
            resnet_time_scale_shift="scale_shift" if scale_shift else "default",
            num_class_embeds=None if num_classes is None else num_classes + 1,
        )
        self.unet = cast(nn.Module, unet)
        for name, module in self.unet.named_modules():
            if name.endswith(("conv2", "to_out.0")) or name == "conv_out":
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.unet(x, t * TIME_SCALE, labels, return_dict=False)[0]


def _norm_groups(channels: int) -> int:
    """32, or fewer where a group would have less than 4 channels: one alone loses what time and label add to it."""
    groups = math.gcd(32, channels)
    while groups > 1 and channels < 4 * groups:
        groups //= 2
    return groups


def _check_unet(net: UNet) -> None:
    if len(net.shape) != 3:
        raise ValueError(f"UNet needs images (channels, height, width), got shape {net.shape}; use MLP for vectors")
    if not net.multipliers or min(net.channels, net.blocks, net.head_channels, *net.multipliers) < 1:
        given = f"{net.channels}, {net.blocks}, {net.head_channels} and {net.multipliers}"
        raise ValueError(f"UNet needs channels, blocks, head_channels and multipliers of at least 1, got {given}")
    if net.norm_groups < 1 or any(net.channels * m % net.norm_groups for m in net.multipliers):
        raise ValueError(f"UNet.norm_groups {net.norm_groups} does not divide the widths of the levels")
    factor = 2 ** (len(net.multipliers) - 1)
    if net.shape[1] % factor or net.shape[2] % factor:
        raise ValueError(
            f"UNet.multipliers {net.multipliers} halve the image {len(net.multipliers) - 1} times: "
            f"{net.shape[1]}x{net.shape[2]} is not divisible by {factor}; use fewer levels or another image size"
        )
    heights = [net.shape[1] // 2**level for level in range(len(net.multipliers))]
    missing = [a for a in net.attention if a not in heights]
    if missing:
        raise ValueError(f"UNet.attention {missing[0]} is not among the resolutions {heights} of this network")
    widths = [net.channels * m for m, h in zip(net.multipliers, heights, strict=True) if h in net.attention]
    widths.append(net.channels * net.multipliers[-1])  # the middle block attends too
    for width in widths:
        if width % net.head_channels:
            raise ValueError(f"UNet.head_channels {net.head_channels} does not divide the attention width {width}")


class MLP(nn.Module):
    """A residual multilayer perceptron for vectors, conditioned on time by a positional embedding.

    Args:
        shape: (dimension,) of the data, or any shape, which is flattened.
        num_classes: number of classes, or None.
        width: hidden width.
        depth: number of residual blocks.
    """

    def __init__(self, shape: Sequence[int], num_classes: int | None = None, width: int = 256, depth: int = 3) -> None:
        super().__init__()
        if width < 2 or width % 2 or depth < 1:
            raise ValueError(f"MLP needs an even width and a depth of at least 1, got width {width} and depth {depth}")
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


def time_embedding(t: Tensor, width: int) -> Tensor:
    """(B,) times to (B, width) sines and cosines of frequencies from 1 to 1e-4 per unit of ``TIME_SCALE * t``."""
    frequencies = torch.exp(torch.linspace(0, -math.log(1e4), width // 2, dtype=torch.float32, device=t.device))
    angles = TIME_SCALE * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
