"""Models to give away: weights as safetensors with a description beside them, and a folder that diffusers loads."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fmlit
from fmlit import checkpoints, descriptions
from fmlit.commands import Names, find_checkpoint, folder_of_run, new_folder
from fmlit.generative import GenerativeModel
from fmlit.networks import TIME_SCALE, UNet

WEIGHTS, DESCRIPTION, DIFFUSERS = "model.safetensors", "model.json", "diffusers"


def export(checkpoint: str, weights: str = "ema", out: str | None = None, trust: Names = Names()) -> dict[str, Any]:
    """Write a trained model into a folder, for others to use without the checkpoint.

    The folder holds model.safetensors and model.json, from which fmlit.export.load builds the model, a README, and for
    a UNet the folder diffusers/, which diffusers.UNet2DModel.from_pretrained loads. The last line of output is JSON.

    Args:
        checkpoint: A checkpoint, or the folder of a run.
        weights: ema for the first average, raw for the trained weights, or the name of an average.
        out: The folder, which must be new; by default export/ in the run folder.
        trust: Packages besides fmlit whose classes the checkpoint may name.
    """
    file = find_checkpoint(checkpoint)
    folder = Path(out) if out else folder_of_run(file) / "export"
    model = checkpoints.load_model(file, weights, trust)
    images_seen = checkpoints.load(file).get("images_seen")
    with new_folder(folder) as partial:
        save(model, partial, {"weights": weights, "images_seen": images_seen})
        written = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    parameters = sum(parameter.numel() for parameter in model.net.parameters())
    return {"folder": str(folder), "weights": weights, "parameters": parameters, "files": written}


def save(model: GenerativeModel, folder: Path, origin: dict[str, Any] | None = None) -> None:
    """Write a model's files into an existing folder; ``origin`` is kept in the description as it is."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.net.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    description = {"fmlit": fmlit.__version__, **(origin or {}), "model": descriptions.describe(model)}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    (folder / "README.md").write_text(readme(model))
    if isinstance(model.net, UNet):
        model.net.unet.save_pretrained(folder / DIFFUSERS)


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
    """What somebody who has the folder alone needs to know of path, prediction, time scale and labels."""
    classes = "Unconditional."
    if model.num_classes is not None:
        classes = f"Class-conditional: labels 0 to {model.num_classes - 1}; {model.null_label} stands for no label."
    text = f"""# A generative model

Made with [fmlit](https://pypi.org/project/fmlit) {fmlit.__version__}. Samples have shape {tuple(model.shape)}, images in
[-1, 1]. {classes}

Time runs from t = 0 (noise) to t = 1 (data); x_t = alpha(t) z + beta(t) eps, with z the data and eps standard normal.

- Path, {type(model.path).__name__}: {_summary(model.path)}
- Prediction, {type(model.prediction).__name__}: {_summary(model.prediction)}

```python
from fmlit.export import load
from fmlit.randomness import image_seeds
from fmlit.samplers import ODESampler

model = load("{{this folder}}")
samples = ODESampler().sample(model, image_seeds(0, range(16)))
```
"""
    return text + _diffusers_part(model) if isinstance(model.net, UNet) else text
