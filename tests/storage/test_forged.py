"""Checkpoints that were made up: refused in one line, soon, and within little memory."""

import copy
import math
import random
import resource
import sys
import time

import pytest
import torch

import fmlit
from fmlit import CondOTPath, FlowMatchingModule, GenerativeModel, UNet, Velocity
from fmlit.storage.checkpoints import newest_valid
from fmlit.storage.descriptions import MAX_DEPTH, describe
from fmlit.storage.run_folder import RunFolder
from fmlit.training.resume import find_start

SECONDS, MEGABYTES = 5, 500
ODD = [2**40, 10**30, 2_000_000, 30_000, -1, 0, math.inf, math.nan, True, None, "", "fmlit.UNet", [], {}, (1,) * 10_000]


def network():
    torch.manual_seed(0)
    return UNet((3, 8, 8), num_classes=4, channels=8, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=8)


def checkpoint():
    net = network()
    model = GenerativeModel(net, CondOTPath(), Velocity(), (3, 8, 8), 4)
    weights = net.state_dict()
    trained = {f"model.net.{name}": value for name, value in weights.items()}
    return {"state_dict": trained, "ema": {"ema_500": weights}, "model_description": describe(model), "images_seen": 1}


def write(content, path):
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)  # pickling follows the nesting
    try:
        torch.save(content, path)
    finally:
        sys.setrecursionlimit(limit)


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def odd_tensors():
    return [
        torch.zeros(1).expand(2**40),
        torch.empty(4, device="meta"),
        torch.eye(4).to_sparse(),
        torch.zeros(4, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.quint8),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        torch.zeros(0),
    ]


def places(value):
    """All dicts within a value, with each of their keys."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield value, key
            yield from places(item)


def mutated(written, seed):
    """A checkpoint of which one or two things are replaced, renamed or gone."""
    forged, choose = copy.deepcopy(written), random.Random(seed)
    for _ in range(choose.choice((1, 1, 2))):
        part = choose.choice([forged, forged["model_description"], forged.get("ema", {})])
        found = list(places(part))
        if not found:
            continue
        container, key = choose.choice(found)
        action = choose.choice(["replace", "replace", "tensor", "deep", "rename", "delete"])
        if action == "delete":
            del container[key]
        elif action == "rename":
            container[choose.choice(["class_path", "x" * 10_000, "weight", "net"])] = container.pop(key)
        else:
            values = {"tensor": odd_tensors(), "deep": [deep(60), deep(1500), {"class_path": deep(3)}]}
            container[key] = choose.choice(values.get(action, ODD))
    return forged


def refusal(path, load=fmlit.load):
    """What is said of a file, or None if it is loaded. It must come soon and within little memory."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    try:
        load(path)
        said = None
    except (fmlit.UserError, FileNotFoundError) as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) < 2_000
    assert time.perf_counter() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < MEGABYTES * 1024  # of kilobytes
    return said


def test_checkpoints_with_random_forgeries_are_refused_or_harmless(tmp_path):
    path, refused = tmp_path / "last.ckpt", 0
    write(checkpoint(), path)
    assert refusal(path) is None
    for seed in range(200):
        write(mutated(checkpoint(), seed), path)
        refused += refusal(path) is not None
    assert refused > 100  # a change of what nobody reads is harmless


def test_a_run_is_not_resumed_from_a_forgery(tmp_path):
    def resume(path):
        return find_start(RunFolder(tmp_path), module, required=True)

    path, refused = tmp_path / "checkpoints" / "last.ckpt", 0
    path.parent.mkdir()
    module = FlowMatchingModule(network(), num_classes=4, conditional=True)
    about = {"optimizer": module.optimizer.kind, "model_description": describe(module.model)}
    written = checkpoint() | about | {"global_step": 1, "state_dict": module.state_dict()}
    write(written, path)
    assert refusal(path, resume) is None
    for seed in range(100):
        write(mutated(written, seed), path)
        refused += refusal(path, resume) is not None
    assert refused > 40


@pytest.mark.parametrize(
    ("argument", "value"), [("channels", 2048), ("channels", 2**30), ("blocks", 2000), ("multipliers", (1, 2) * 500)]
)
def test_a_network_far_larger_than_its_file_is_not_built(argument, value, tmp_path):
    forged = checkpoint()
    forged["model_description"]["init_args"]["net"]["init_args"][argument] = value
    write(forged, tmp_path / "last.ckpt")
    assert "last.ckpt: " in refusal(tmp_path / "last.ckpt")


def test_a_deep_network_is_not_built_for_few_weights(tmp_path):
    forged = checkpoint()
    arguments = {"shape": (3, 8, 8), "num_classes": 4, "depth": 30_000_000, "width": 8}
    forged["model_description"]["init_args"]["net"] = {"class_path": "fmlit.MLP", "init_args": arguments}
    write(forged, tmp_path / "last.ckpt")
    assert "are too few" in refusal(tmp_path / "last.ckpt")


@pytest.mark.parametrize("tensor", odd_tensors(), ids=range(len(odd_tensors())))
def test_weights_that_are_no_plain_tensors_of_the_right_shape_are_refused(tensor, tmp_path):
    forged = checkpoint()
    forged["ema"]["ema_500"][next(iter(forged["ema"]["ema_500"]))] = tensor
    write(forged, tmp_path / "last.ckpt")
    assert "last.ckpt" in refusal(tmp_path / "last.ckpt")


def test_data_that_are_nested_too_deep_are_refused_wherever_they_are(tmp_path):
    for place in ("model_description", "optimizer", "anything"):
        write(checkpoint() | {place: deep(1500)}, tmp_path / "last.ckpt")
        assert f"nested more than {MAX_DEPTH} deep" in refusal(tmp_path / "last.ckpt")


@pytest.mark.parametrize("progress", [math.inf, math.nan, "many", [], torch.zeros(2), torch.zeros(1, device="meta")])
def test_a_checkpoint_with_odd_progress_is_skipped(progress, tmp_path, caplog):
    write(checkpoint() | {"images_seen": progress}, tmp_path / "a.ckpt")
    write(checkpoint(), tmp_path / "b.ckpt")
    assert newest_valid(tmp_path).name == "b.ckpt"
