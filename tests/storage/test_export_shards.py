"""What an export stores: half precision, several files, and what is said of those that are wrong."""

import json
import shutil
import stat
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch import nn

from fmlit import Digits
from fmlit.cli.export import export as export_command
from fmlit.cli.options import run
from fmlit.flows.paths import CondOTPath
from fmlit.flows.predictions import Velocity
from fmlit.models.generative_model import GenerativeModel
from fmlit.models.mlp import MLP
from fmlit.models.unet import UNet
from fmlit.storage import exports
from tests.helpers.known_model import known_model, save_run
from tests.helpers.small_runs import same
from tests.storage.test_exports import unet_model

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def half(model: GenerativeModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is left of the weights in half precision, as float32."""
    return {name: value.to(dtype).float() for name, value in model.net.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [*HALF])
def test_weights_in_half_precision_take_half_the_room_and_are_loaded_as_float32(dtype, tmp_path):
    model = unet_model()
    for name in ("float32", dtype):
        (tmp_path / name).mkdir()
        exports.save(model, tmp_path / name, {"weights": "ema"}, name)
        assert json.loads((tmp_path / name / "model.json").read_text())["dtype"] == name
    folder = tmp_path / dtype
    assert load_file(folder / "model.safetensors").keys() == model.net.state_dict().keys()
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {HALF[dtype]}
    for path in ("model.safetensors", "diffusers/diffusion_pytorch_model.safetensors"):
        assert 0.5 <= (folder / path).stat().st_size / (tmp_path / "float32" / path).stat().st_size < 0.6

    loaded = exports.load(folder)
    assert same(loaded.net.state_dict(), half(model, HALF[dtype]))
    assert {parameter.dtype for parameter in model.net.parameters()} == {torch.float32}  # still
    x, t, labels = torch.randn(5, 1, 8, 8), torch.rand(5), torch.tensor([0, 3, 9, 10, 10])
    alone = UNet2DModel.from_pretrained(folder / "diffusers").eval()
    assert torch.equal(alone(x, 1000 * t, labels).sample, loaded.net(x, t, labels))
    assert f"stored in {dtype} and loaded as float32" in (folder / "README.md").read_text()
    assert "stored in" not in (tmp_path / "float32" / "README.md").read_text()


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_are_of_the_size_asked_for_and_give_the_same_model(dtype, tmp_path):
    torch.manual_seed(0)
    net = UNet((1, 8, 8), 10, channels=32, multipliers=(1, 2), blocks=2, attention=(4,), head_channels=32)
    model = GenerativeModel(net, CondOTPath(), Velocity(), (1, 8, 8), 10).eval()
    exports.save(model, tmp_path, dtype=dtype, shard_mb=1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == net.state_dict().keys()
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == sorted(set(index.values()))
    stored = sum(value.numel() * value.element_size() for value in net.state_dict().values())
    assert len(shards) > stored // (1 if dtype == "float32" else 2) // 10**6 >= 1
    for shard in (*tmp_path.glob("*.safetensors"), *(tmp_path / "diffusers").glob("*.safetensors")):
        assert sum(value.numel() * value.element_size() for value in load_file(shard).values()) <= 10**6
        assert shard.stat().st_mode & stat.S_IRGRP
    loaded = exports.load(tmp_path)
    assert same(loaded.net.state_dict(), net.state_dict() if dtype == "float32" else half(model, torch.bfloat16))
    x, t, labels = torch.randn(5, 1, 8, 8), torch.rand(5), torch.tensor([0, 3, 9, 10, 10])
    alone = UNet2DModel.from_pretrained(tmp_path / "diffusers").eval()
    assert torch.equal(alone(x, 1000 * t, labels).sample, loaded.net(x, t, labels))


def test_a_model_that_fits_into_one_file_has_no_index(tmp_path):
    run_folder = str(save_run(tmp_path / "run", unet_model(), Digits()))
    written = export_command(run_folder, out=str(tmp_path / "out"), shard_mb=100)["files"]
    assert "model.safetensors" in written
    assert not [name for name in written if "index" in name or "-of-" in name]


def test_weights_beyond_float16_are_named(tmp_path, capsys):
    model = unet_model()
    largest = torch.finfo(torch.float16).max
    weight = model.net.unet.conv_in.weight
    with torch.no_grad():
        weight[0, 0, 0, 0] = -largest
    exports.save(model, tmp_path, dtype="float16")  # the last that fits
    with torch.no_grad():
        weight[0, 0, 0, 0] = -70000
    with pytest.raises(
        ValueError, match=r"^unet\.conv_in\.weight holds weights up to 70000, and float16 ends at 65504"
    ):
        exports.save(model, tmp_path, dtype="float16")
    run_folder = str(save_run(tmp_path / "run", model, Digits()))
    with pytest.raises(SystemExit) as stopped:
        run(export_command, ["--checkpoint", run_folder, "--out", str(tmp_path / "out"), "--dtype", "float16"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("float16 ends at 65504: use bfloat16 or float32\n")
    assert not (tmp_path / "out").exists()
    assert export_command(run_folder, out=str(tmp_path / "out"), dtype="bfloat16")["dtype"] == "bfloat16"


def test_options_that_make_no_sense_are_named(tmp_path, capsys):
    run_folder = str(save_run(tmp_path / "run", known_model(), Digits()))
    for option, value, said in (
        ("--dtype", "float8", "dtype: Expected one of ['float32', 'float16', 'bfloat16']"),
        ("--shard_mb", "0", "shard_mb must be at least 1 megabyte, got 0"),
    ):
        with pytest.raises(SystemExit):
            run(export_command, ["--checkpoint", run_folder, "--out", str(tmp_path / "out"), option, value])
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, got 'half'"):
        exports.save(known_model(), tmp_path, dtype="half")


class Tied(nn.Module):
    """Two layers with one weight, and a counter."""

    def __init__(self, shape, num_classes=None, wide=False):
        super().__init__()
        self.shape, self.num_classes, self.wide = tuple(shape), num_classes, wide
        self.first, self.second = (nn.Linear(2, 2, dtype=torch.float64 if wide else None) for _ in range(2))
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.tensor(2**30 + 1))

    def forward(self, x, t, labels=None):
        return self.second(self.first(x))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_that_share_their_memory_and_counters_survive(dtype, wide, tmp_path):
    model = GenerativeModel(Tied((2,), wide=wide), CondOTPath(), Velocity(), (2,))
    exports.save(model, tmp_path, dtype=dtype)
    net = exports.load(tmp_path, trust=[Tied.__module__]).net
    assert net.second.weight is net.first.weight
    assert net.count == 2**30 + 1
    assert net.first.weight.dtype == torch.float32
    assert torch.equal(net.first.weight, model.net.first.weight.to(getattr(torch, dtype)).float())


def sharded(folder: Path) -> tuple[Path, dict]:
    """An exported model in several files, with its index."""
    folder.mkdir()
    model = GenerativeModel(MLP((2,), width=256, depth=3), CondOTPath(), Velocity(), (2,))
    exports.save(model, folder, shard_mb=1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 2
    return folder, index


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
def test_a_flipped_bit_of_any_file_is_found_by_its_hash(tmp_path):
    exports.save(unet_model(), tmp_path, shard_mb=1)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors"))
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    check = partial(subprocess.run, command, cwd=tmp_path, capture_output=True, check=False)
    assert len(files) == len((tmp_path / "SHA256SUMS").read_text().splitlines()) == 2
    for file in files:
        whole = bytearray((tmp_path / file).read_bytes())
        assert check().returncode == 0
        (tmp_path / file).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert check().returncode == 1
        if file.parent == Path():
            with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its SHA-256 .* copy it again"):
                exports.load(tmp_path)
        (tmp_path / file).write_bytes(whole)
    assert exports.load(tmp_path)


def test_shards_that_are_missing_damaged_or_elsewhere_are_named(tmp_path):
    folder, index = sharded(tmp_path / "model")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    whole = first.read_bytes()

    def fails(message: str) -> None:
        with pytest.raises(ValueError, match=f"^{folder} does not hold an exported model: .*{message}") as caught:
            exports.load(folder)
        assert "\n" not in str(caught.value)

    first.unlink()
    fails(first.name)
    for damaged in (whole[:-100], whole[:4], b"", b"\xff" * 100):
        first.write_bytes(damaged)
        fails(f"{first.name} is damaged")
    (folder / "SHA256SUMS").unlink()  # an export of old
    for damaged in (whole[:-100], whole[:4], b"", b"\xff" * 100):
        first.write_bytes(damaged)
        fails(f"{first.name} is damaged")
    first.write_bytes(second.read_bytes())
    fails(f"{first.name} does not hold the tensors that model.safetensors.index.json places there")
    first.write_bytes(whole)
    assert exports.load(folder)

    def indexed(content) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(whole)
    for name in ("../outside.safetensors", str(outside)):
        indexed({"weight_map": {tensor: name if f == first.name else f for tensor, f in index["weight_map"].items()}})
        fails(f"model.safetensors.index.json names {name}, which is outside of the folder")
    fewer = dict(list(index["weight_map"].items())[1:])
    indexed({"weight_map": fewer})
    fails(f"{first.name} does not hold the tensors")
    indexed({"weight_map": {tensor: f for tensor, f in index["weight_map"].items() if f != first.name}})
    fails(r"its weights do not fit the network that it describes: \d+ missing \(")
    for content in ({}, [], {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": [1]}}):
        indexed(content)
        fails("")
    indexed(index)
    assert exports.load(folder)
