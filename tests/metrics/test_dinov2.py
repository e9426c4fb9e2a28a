"""DINOv2's features: what Meta's own code makes of the same weights, and refusals of files that are something else."""

import math
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fmlit.metrics import DINOv2Features, dinov2
from fmlit.metrics.protocol import Protocol, metric_key

# The first features of `pictures(side)` by Meta's code (interpolated position embeddings, layer scale and all) from
# `meta_state()`, after Pillow's resize; and how near ours must come: where that resizes, some levels differ by one.
BY_META = {
    224: ([[-0.1740546, 1.7021506, -0.3914186, -0.7719063], [-0.2688502, 1.6748649, -0.5758637, -0.9350690]], 1e-5),
    32: ([[0.29325, 2.00029, 0.00304, -0.58547], [0.29698, 1.96274, 0.04339, -0.52720]], 2e-3),
}


def meta_state(width: int = 64, depth: int = 2) -> dict[str, Tensor]:
    """Weights of a small network under Meta's names: all of them matter, and they are the same everywhere."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1370, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{i}.{name}"] = (width,)
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    state = {}
    for number, (name, shape) in enumerate(shapes.items()):
        wave = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) ** 1.5 + number)
        state[name] = (0.2 * wave + (1 if "norm" in name and name.endswith("weight") else 0)).float().reshape(shape)
    return state


def pictures(side: int = 32) -> Tensor:
    return (torch.arange(2 * 3 * side * side) ** 2 % 251).to(torch.uint8).reshape(2, 3, side, side)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(dinov2, "NETWORKS", {64: ("vitt14", 2)})


def saved(path, state) -> str:
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("side", BY_META)
def test_features_are_those_of_metas_code(side, small, tmp_path):
    before = torch.get_rng_state()
    features = DINOv2Features(saved(tmp_path / "dinov2.pth", meta_state()))
    assert torch.equal(torch.get_rng_state(), before)
    found = features(pictures(side))
    assert found.shape == (2, 64)
    assert features.dimension == 64
    expected, tolerance = BY_META[side]
    torch.testing.assert_close(found[:, :4], torch.tensor(expected), atol=tolerance, rtol=0)


def test_they_carry_the_name_of_their_network(small, tmp_path):
    features = DINOv2Features(saved(tmp_path / "dinov2.pth", meta_state()))
    assert metric_key("fid", features.name, 50_000) == "fd_dinov2_vitt14_50k"
    protocol = Protocol(features.name, 50_000, "train", features.preprocessing, weights="ema", sampler="heun18")
    assert str(protocol) == "fddinov2_vitt14-50k-train-bicubic224-uint8-ema-heun18"
    other = meta_state()
    other["blocks.1.ls2.gamma"] *= 1.001
    assert DINOv2Features(saved(tmp_path / "other.pth", other)).fingerprint != features.fingerprint


def test_both_files_of_the_same_weights_give_the_same_features(small, tmp_path):
    state = meta_state()
    meta = DINOv2Features(saved(tmp_path / "dinov2.pth", state))
    del state["mask_token"]  # timm's file has none
    save_file(state, tmp_path / "model.safetensors")
    timm = DINOv2Features(str(tmp_path / "model.safetensors"))
    assert torch.equal(meta(pictures()), timm(pictures()))
    assert meta.fingerprint == timm.fingerprint


def test_gray_is_repeated_and_batches_do_not_matter(small, tmp_path):
    features = DINOv2Features(saved(tmp_path / "dinov2.pth", meta_state()))
    gray = pictures()[:, :1].repeat(9, 1, 1, 1)  # more than a chunk
    found = features(gray)
    torch.testing.assert_close(found[:2], features(gray[:2].repeat(1, 3, 1, 1)))
    torch.testing.assert_close(found[16:], found[:2])
    with pytest.raises(ValueError, match="gray or RGB images, got 2 channels"):
        features(pictures()[:, :2])


def changed(**changes) -> dict[str, Tensor]:
    state = meta_state()
    for name, value in changes.items():
        state.pop(name, None)
        if value is not None:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (meta_state(width=128), "does not hold DINOv2's ViT-S/14, ViT-B/14 or ViT-L/14 in Meta's layout"),
        ({"embeddings.cls_token": torch.zeros(1, 1, 64)}, "does not hold DINOv2's ViT-S/14"),  # transformers' names
        ({"cls_token": torch.zeros(1, 1, 64)}, "does not hold the weights of a DINOv2 network of width 64"),
        (meta_state(depth=3), "does not hold the weights of a DINOv2 network of width 64"),
        (changed(register_tokens=torch.zeros(1, 4, 64)), "does not hold the weights of a DINOv2 network of width 64"),
        (changed(**{"blocks.0.mlp.fc2.bias": None}), "does not hold the weights of a DINOv2 network of width 64"),
        (changed(pos_embed=torch.zeros(1, 1000, 64)), "does not hold the weights of a DINOv2 network of width 64"),
        ([1, 2], "is not a state dict, names and tensors, but list"),
    ],
)
def test_files_that_are_something_else_are_refused_by_name(small, tmp_path, state, said):
    with pytest.raises(ValueError, match=rf"x\.pth {said}") as caught:
        DINOv2Features(saved(tmp_path / "x.pth", state))
    assert "\n" not in str(caught.value)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_files_that_are_missing_or_would_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no weights file nowhere\.pth"):
        DINOv2Features("nowhere.pth")
    with pytest.raises(ValueError, match=r"x\.pth is not a weights file"):
        DINOv2Features(saved("x.pth", {"cls_token": Payload()}))
    assert not (tmp_path / "executed").exists()
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"x\.safetensors is not a weights file"):
        DINOv2Features("x.safetensors")
