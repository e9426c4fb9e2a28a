"""Where a run computes, and which GPUs of the machine it leaves idle, in words."""

import os
from pathlib import Path

import lightning.pytorch as pl
import torch

DRIVER = Path("/proc/driver/nvidia/gpus")  # one folder per GPU that NVIDIA's driver has found


def describe_devices(trainer: pl.Trainer) -> str:
    """The device, the precision and the number of processes, and what was found but is not used."""
    device = trainer.strategy.root_device
    kinds = {"cpu": "the CPU", "mps": "Apple's GPU"}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else kinds.get(device.type, str(device))
    processes = f"{trainer.world_size} process{'es' if trainer.world_size > 1 else ''}"
    idle = idle_gpus(trainer.num_devices if device.type == "cuda" else 0, device.type)
    return f"on {name} in {trainer.precision}, {processes}" + (f"; {idle}" if idle else "")


def idle_gpus(used: int, kind: str) -> str:
    """The GPUs of this machine that are found but not used, and why; empty if there are none.

    Args:
        used: number of NVIDIA or AMD GPUs that the run uses on this machine.
        kind: the type of the device that it runs on.
    """
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if usable > used:
        option = "trainer.devices sets their number" if used else "trainer.accelerator chooses the device"
        return f"{_gpus(usable - used)} found but not used: {option}"
    if kind == "cpu" and torch.backends.mps.is_available():
        return f"{_gpus(1)} found but not used: trainer.accelerator chooses the device"
    installed = len(list(DRIVER.glob("*")))
    if kind != "cpu" or not installed:
        return ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        reason = "this torch was built without CUDA"
    elif hidden is not None:
        reason = f"CUDA_VISIBLE_DEVICES is {hidden!r}"
    else:
        reason = f"torch cannot use the driver; it needs one for CUDA {torch.version.cuda}"
    return f"{_gpus(installed)} found but not used: {reason}"


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"
