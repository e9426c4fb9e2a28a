"""The U-Net for images.

Every network of fmlit is called as ``net(x, t, labels)`` with x (B, *shape), t (B,) in [0, 1], and labels int64 (B,) or
None. It is built from the shape of the data and the number of classes. With classes, it embeds one more label: the null
label ``num_classes``, which stands for "unconditional".
"""

import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from fmlit.core.errors import UserError
from fmlit.models.time_embedding import TIME_SCALE


class UNet(nn.Module):
    """``diffusers.UNet2DModel``, configured as the field's standard U-Net for small images. The defaults fit CIFAR-10.

    It equals the network of torchcfm and of "Improved DDPM" in shape, parameters and initialization. The last
    convolution of every residual branch starts at zero, so that training starts from the identity.

    References:
        Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2102.09672
        Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", https://arxiv.org/abs/2105.05233

    Args:
        shape: (channels, height, width) of the images. Height and width must be divisible by 2^(levels - 1).
        num_classes: number of classes, or None for an unconditional network.
        channels: width of the first level.
        multipliers: width of each level as a multiple of ``channels``. The resolution halves between levels.
        blocks: residual blocks per level.
        attention: resolutions (heights in pixels) at which self-attention is used.
        head_channels: channels of one attention head.
        dropout: dropout probability in the residual blocks.
        scale_shift: let time and label scale and shift the normalized activations ("adaptive group normalization",
            Dhariwal & Nichol 2021). Otherwise they are added.
        norm_groups: number of groups in the group normalizations. The default is 32, or fewer if a group would have
            less than 4 channels.
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
        # A checkpoint keeps the number itself, because no tensor's shape would reveal a change of the rule.
        self.norm_groups = _norm_groups(channels) if norm_groups is None else norm_groups
        self.channels, self.multipliers, self.blocks = channels, tuple(multipliers), blocks
        self.attention, self.head_channels, self.dropout = tuple(attention), head_channels, dropout
        _check_unet(self)

        from diffusers import UNet2DModel  # takes seconds to import, so only when a U-Net is built

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
    """32, or fewer if a group would have less than 4 channels. A single channel would lose what time and label add."""
    groups = math.gcd(32, channels)
    while groups > 1 and channels < 4 * groups:
        groups //= 2
    return groups


def _check_unet(net: UNet) -> None:
    if len(net.shape) != 3:
        raise UserError(f"UNet needs images (channels, height, width), got shape {net.shape}; use MLP for vectors")
    if not net.multipliers or min(net.channels, net.blocks, net.head_channels, *net.multipliers) < 1:
        given = f"{net.channels}, {net.blocks}, {net.head_channels} and {net.multipliers}"
        raise UserError(f"UNet needs channels, blocks, head_channels and multipliers of at least 1, got {given}")
    if net.norm_groups < 1 or any(net.channels * m % net.norm_groups for m in net.multipliers):
        raise UserError(f"UNet.norm_groups {net.norm_groups} does not divide the widths of the levels")
    factor = 2 ** (len(net.multipliers) - 1)
    if net.shape[1] % factor or net.shape[2] % factor:
        raise UserError(
            f"UNet.multipliers {net.multipliers} halve the image {len(net.multipliers) - 1} times: "
            f"{net.shape[1]}x{net.shape[2]} is not divisible by {factor}; use fewer levels or another image size"
        )
    heights = [net.shape[1] // 2**level for level in range(len(net.multipliers))]
    missing = [a for a in net.attention if a not in heights]
    if missing:
        raise UserError(f"UNet.attention {missing[0]} is not among the resolutions {heights} of this network")
    widths = [net.channels * m for m, h in zip(net.multipliers, heights, strict=True) if h in net.attention]
    widths.append(net.channels * net.multipliers[-1])  # the middle block attends too
    for width in widths:
        if width % net.head_channels:
            raise UserError(f"UNet.head_channels {net.head_channels} does not divide the attention width {width}")
