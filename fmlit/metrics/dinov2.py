"""DINOv2's class token, in which Fréchet distances follow people's judgement better (Stein et al. 2023)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fmlit.core.errors import UserError
from fmlit.metrics.features import NetworkFeatures, read_weights

# By the width of a network: its name in Meta's release, and its depth. ViT-g has gated layers, and is left out.
NETWORKS = {384: ("vits14", 12), 768: ("vitb14", 12), 1024: ("vitl14", 24)}
SIDE, PATCH, HEAD = 224, 14, 64  # pixels, pixels, channels of an attention head
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

# Parts of Meta's names, and of torchvision's for the same tensors.
RENAMED = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.": "conv_proj.",
    "blocks.": "encoder.layers.encoder_layer_",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attn.qkv.": ".self_attention.in_proj_",
    ".attn.proj.": ".self_attention.out_proj.",
    ".mlp.fc1.": ".mlp.0.",
    ".mlp.fc2.": ".mlp.3.",
}


class DINOv2Features(NetworkFeatures):
    """The normalized class token of a DINOv2 network, without registers: ViT-S/14, ViT-B/14 or ViT-L/14.

    As in dgm-eval, the code of Stein et al. (whose network is ViT-L/14): images are resized to 224x224 pixels
    (bicubic, in 256 levels) and normalized as ImageNet's; position embeddings are interpolated as in Meta's code. Gray
    images are repeated to RGB. Features are named after the network: ``fd_dinov2_vitl14_50k``.

    Args:
        weights: ``dinov2_vitl14_pretrain.pth`` and its like as Meta publishes them, or timm's ``.safetensors`` of
            ``vit_large_patch14_dinov2.lvd142m``, which hold the same.

    Raises:
        UserError: the file is missing or holds something else. That weights of the right names and shapes are those
            of DINOv2 is not checked: the fingerprint of cached statistics tells one set from another.
    """

    preprocessing = "bicubic224"

    def __init__(self, weights: str) -> None:
        self.weights = weights
        state = read_weights(weights)
        width = state["cls_token"].shape[-1] if "cls_token" in state else 0
        if width not in NETWORKS:
            raise UserError(f"{weights} does not hold DINOv2's ViT-S/14, ViT-B/14 or ViT-L/14 in Meta's layout")
        name, depth = NETWORKS[width]
        super().__init__(_build(state, width, depth, weights), f"dinov2_{name}")

    def extract(self, images: Tensor) -> Tensor:
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import normalize, resize

        features = []
        for chunk in self.rgb_chunks(images):
            pixels = resize(chunk, [SIDE, SIDE], InterpolationMode.BICUBIC, antialias=True)  # as Pillow's
            features.append(self.module(normalize(pixels.float() / 255, list(MEAN), list(STD))))
        return torch.cat(features)


def _build(state: dict[str, Tensor], width: int, depth: int, origin: str) -> nn.Module:
    """torchvision's vision transformer with these weights."""
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng(devices=[]):  # layers are initialized before they are loaded
        network = VisionTransformer(SIDE, PATCH, depth, width // HEAD, width, 4 * width)
    network.heads = nn.Identity()
    try:
        network.load_state_dict(_as_torchvision(state))
    except (KeyError, ValueError, RuntimeError) as error:  # missing, unexpected or misshapen tensors
        raise UserError(f"{origin} does not hold the weights of a DINOv2 network of width {width}") from error
    return network.requires_grad_(False)


def _as_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's weights under torchvision's names, for images of 224 pixels.

    torchvision knows no layer scale. It multiplies what leaves a linear layer, and is multiplied into that layer here.
    """
    state = {name: value.float() for name, value in state.items() if name != "mask_token"}  # of training
    state["pos_embed"] = _interpolated(state["pos_embed"])
    for name in [name for name in state if name.endswith(".gamma")]:
        block, scale, _ = name.rsplit(".", 2)
        layer = f"{block}.{'attn.proj' if scale == 'ls1' else 'mlp.fc2'}"
        gamma = state.pop(name)
        state[f"{layer}.weight"] = gamma[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = gamma * state[f"{layer}.bias"]
    renamed = {}
    for name, value in state.items():
        name = "encoder.ln." + name.removeprefix("norm.") if name.startswith("norm.") else name
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    return renamed


def _interpolated(embedding: Tensor) -> Tensor:
    """Position embeddings (1, 1 + k^2, width), learnt on another grid (37x37 patches), on that of 224 pixels.

    With the 0.1 that Meta's code adds to the side: without it features differ.
    """
    grid = embedding[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    if side == SIDE // PATCH:
        return embedding
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (SIDE // PATCH + 0.1) / side
    grid = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([embedding[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
