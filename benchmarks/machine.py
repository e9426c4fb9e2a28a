"""On what was measured: versions, processor, GPU, threads."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "lightning", "diffusers", "torchvision", "torchcfm", "flow-matching", "accelerate")


def versions() -> dict[str, str | None]:
    """Of Python, fmlit and the packages that take part; None for what is not installed."""
    import fmlit

    found: dict[str, str | None] = {"python": platform.python_version(), "fmlit": fmlit.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # with the CUDA that it was built for
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine as this process sees it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    seen: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        seen |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return seen


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
