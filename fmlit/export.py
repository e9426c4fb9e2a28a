"""Models to give away: weights as safetensors with a description beside them, and a folder that diffusers loads."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fmlit
from fmlit import descriptions
from fmlit.generative import GenerativeModel
from fmlit.networks import TIME_SCALE, UNet
from fmlit.predictions import Velocity

WEIGHTS, DESCRIPTION, DIFFUSERS = "model.safetensors", "model.json", "diffusers"


def save(model: GenerativeModel, folder: Path, origin: dict[str, Any] | None = None) -> None:
    """Write a model's files into an existing folder; ``origin`` is kept in the description as it is."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.net.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    description = {"fmlit": fmlit.__version__, **(origin or {}), "model": descriptions.describe(model)}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    (folder / "README.md").write_text(readme(model))
    if isinstance(model.net, UNet):
        unet: Any = model.net.unet
        unet.save_pretrained(folder / DIFFUSERS)
    for path in folder.rglob("*.safetensors"):  # which safetensors creates for the owner's eyes only
        path.chmod((folder / "README.md").stat().st_mode)


def load(folder: str | Path, trust: Sequence[str] = (), device: torch.device | str = "cpu") -> GenerativeModel:
    """The model that was exported into a folder, in evaluation mode.

    Args:
        folder: what ``scripts/export.py`` wrote.
        trust: packages besides fmlit whose classes may be built, see ``descriptions.build``.
        device: where to put the model.

    Raises:
        ValueError: files that are missing, damaged, or do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model = descriptions.build(json.loads(Path(folder, DESCRIPTION).read_text())["model"], trust)
        if not isinstance(model, GenerativeModel):
            raise ValueError(f"{DESCRIPTION} describes a {type(model).__qualname__}, not a GenerativeModel")
        model.net.load_state_dict(load_file(Path(folder, WEIGHTS)))
    except (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} does not hold an exported model: {' '.join(str(error).split())}") from error
    return model.to(device).eval()


def readme(model: GenerativeModel) -> str:
    """What somebody who has the folder alone needs to know of shapes, labels, time, path and prediction."""
    labels = "It is unconditional."
    if model.num_classes is not None:
        labels = f"It knows the classes 0 to {model.num_classes - 1}; label {model.null_label} stands for none of them."
    parts = [
        "# A generative model",
        f"Made with fmlit {fmlit.__version__}. Samples have shape {model.shape}; images lie in [-1, 1]. {labels}",
        "Time runs from t = 0, noise, to t = 1, data: `x_t = alpha(t) z + beta(t) eps`, with z the data and eps "
        "standard normal noise.",
        *(f"`{part}`\n\n{inspect.getdoc(part)}" for part in (model.path, model.prediction)),
        WITH_FMLIT,
    ]
    if isinstance(model.net, UNet):
        parts += [
            f"The network itself is in {DIFFUSERS}/, and is given the time t as {TIME_SCALE:g} t.",
            _with_diffusers(model),
        ]
    return "\n\n".join(parts) + "\n"


WITH_FMLIT = """```python
from fmlit.export import load
from fmlit.randomness import image_seeds
from fmlit.samplers import ODESampler

model = load(".")
samples = ODESampler().sample(model, image_seeds(0, range(16)))
```"""


def _with_diffusers(model: GenerativeModel) -> str:
    """How diffusers evaluates the network, and where that is a velocity, how Euler's method makes samples of it."""
    labelled = model.num_classes is not None
    shape = ", ".join(str(side) for side in (16, *model.shape))
    euler = isinstance(model.prediction, Velocity)
    lines = ["import torch", "from diffusers import UNet2DModel", ""]
    lines += [f'unet = UNet2DModel.from_pretrained("{DIFFUSERS}").eval()', f"x = torch.randn({shape})"]
    lines += ["labels = torch.zeros(16, dtype=torch.int64)"] if labelled else []
    lines += ["for i in range(50):", "    t = torch.full((16,), i / 50)"] if euler else ["t = torch.full((16,), 0.5)"]
    call = f"unet(x, {TIME_SCALE:g} * t{', labels' if labelled else ''}).sample"
    if euler:
        lines += ["    with torch.no_grad():", f"        x = x + {call} / 50"]
    else:
        lines += [f"output = {call}  # F at x and t"]
    return "\n".join(["```python", *lines, "```"])
