"""The headline says where a run computes, and which GPUs it leaves idle."""

from pathlib import Path

import pytest
import torch

from fmlit.training import devices
from tests.helpers.tiny_cli import train


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with so many GPUs, of which torch can use some."""

    def build(installed=0, usable=0, cuda="13.0", visible=None, mps=False):
        for number in range(installed):
            (tmp_path / "gpus" / str(number)).mkdir(parents=True)
        monkeypatch.setattr(devices, "DRIVER", tmp_path / "gpus")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return build


@pytest.mark.parametrize(
    ("found", "used", "kind", "said"),
    [
        ({}, 0, "cpu", ""),
        ({"installed": 2, "usable": 2}, 2, "cuda", ""),
        ({"installed": 8, "usable": 1}, 2, "cuda", ""),  # each process sees its own
        ({"installed": 4, "usable": 4}, 1, "cuda", "3 GPUs found but not used: trainer.devices sets their number"),
        ({"installed": 1, "usable": 1}, 0, "cpu", "1 GPU found but not used: trainer.accelerator chooses the device"),
        ({"mps": True}, 0, "cpu", "1 GPU found but not used: trainer.accelerator chooses the device"),
        ({"mps": True}, 0, "mps", ""),
        ({"installed": 1, "cuda": None}, 0, "cpu", "1 GPU found but not used: this torch was built without CUDA"),
        ({"installed": 2, "visible": ""}, 0, "cpu", "2 GPUs found but not used: CUDA_VISIBLE_DEVICES is ''"),
        (
            {"installed": 1},
            0,
            "cpu",
            "1 GPU found but not used: torch cannot use the driver; it needs one for CUDA 13.0",
        ),
    ],
)
def test_idle_gpus_are_named_with_the_reason(machine, found, used, kind, said):
    machine(**found)
    assert devices.idle_gpus(used, kind) == said


def test_the_headline_names_device_precision_and_processes(machine, tmp_path: Path):
    machine(installed=1, cuda=None)
    headline = train(tmp_path, "--images=16").out.splitlines()[0]
    assert "; on the CPU in 32-true, 1 process; 1 GPU found but not used: this torch was built without" in headline
