"""Models to give away: weights as safetensors with a description beside them, and a folder that diffusers loads."""

import copy
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import fmlit
from fmlit.core.errors import UserError
from fmlit.core.files import read_hashes, sha256, write_hashes
from fmlit.flows.predictions import Velocity
from fmlit.models.generative_model import GenerativeModel
from fmlit.models.time_embedding import TIME_SCALE
from fmlit.models.unet import UNet
from fmlit.storage import descriptions

WEIGHTS, DESCRIPTION, DIFFUSERS = "model.safetensors", "model.json", "diffusers"
INDEX = f"{WEIGHTS}.index.json"  # of several files: which tensor is in which
HASHES = "SHA256SUMS"  # of all files of weights, as ``sha256sum --check`` reads it

DType = Literal["float32", "float16", "bfloat16"]
DTYPES: dict[DType, torch.dtype] = {name: getattr(torch, name) for name in get_args(DType)}


def save(
    model: GenerativeModel,
    folder: Path,
    origin: dict[str, Any] | None = None,
    dtype: DType = "float32",
    shard_mb: int | None = None,
) -> None:
    """Write a model's files into an existing folder.

    Args:
        model: what to write.
        folder: where to.
        origin: kept in the description as it is.
        dtype: in which floating-point weights are stored.
        shard_mb: megabytes (10^6 bytes) of weights per file; a larger tensor has a file of its own. None for one file.

    Raises:
        UserError: no such ``dtype``, a file size below 1, or a weight beyond the range of ``dtype``, named.
    """
    from huggingface_hub import save_torch_state_dict

    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if shard_mb is not None and shard_mb < 1:
        raise UserError(f"shard_mb must be at least 1 megabyte, got {shard_mb}")
    most = sys.maxsize if shard_mb is None else shard_mb * 10**6
    state = {name: _stored(name, tensor, dtype) for name, tensor in model.net.state_dict().items()}
    save_torch_state_dict(state, folder, max_shard_size=most)
    description = {"fmlit": fmlit.__version__, **(origin or {}), "dtype": dtype, "model": descriptions.describe(model)}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    (folder / "README.md").write_text(readme(model, dtype))
    if isinstance(model.net, UNet):
        # Not the method of diffusers' class, which warns of modules to be kept in float32 where there are none.
        unet: Any = nn.Module.to(copy.deepcopy(model.net.unet), DTYPES[dtype])
        unet.save_pretrained(folder / DIFFUSERS, max_shard_size=most)
    written = sorted(folder.rglob("*.safetensors"))
    for path in written:  # which safetensors creates for the owner's eyes only
        path.chmod((folder / "README.md").stat().st_mode)
    write_hashes(folder / HASHES, [(sha256(path), path.relative_to(folder).as_posix()) for path in written])


def _stored(name: str, tensor: Tensor, dtype: DType) -> Tensor:
    """A copy as it is written: weights that share their memory in the network do not in a file."""
    to = DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype
    stored = tensor.detach().to("cpu", to, copy=True, memory_format=torch.contiguous_format)
    if not torch.equal(stored.isinf(), tensor.isinf().cpu()):
        most = torch.finfo(to).max
        wider = [name for name, other in DTYPES.items() if torch.finfo(other).max > most]
        use = " or ".join(reversed(wider))
        raise UserError(f"{name} holds weights up to {tensor.abs().max():g}, and {dtype} ends at {most:g}: use {use}")
    return stored


def load(folder: str | Path, trust: Sequence[str] = (), device: torch.device | str = "cpu") -> GenerativeModel:
    """The model that was exported into a folder, in evaluation mode; in float32, whatever its weights are stored in.

    Args:
        folder: what ``fmlit export`` wrote.
        trust: packages besides fmlit whose classes may be built, see ``descriptions.build``.
        device: where to put the model.

    Raises:
        UserError: files that are missing, damaged, or do not fit each other.
    """
    folder = Path(folder)
    try:
        description, weights = read_description(folder)["model"], _read_weights(folder)
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise _not_exported(folder, error) from error
    try:
        model = descriptions.build_model(description, weights, trust)
    except UserError as error:  # any other error is a bug in a class of the user's own
        raise _not_exported(folder, error) from error
    return model.to(device).float().eval()


def _not_exported(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder} does not hold an exported model: {' '.join(str(error).split())}")


def read_description(folder: Path) -> dict[str, Any]:
    """What is known of an exported model: the class and arguments of each part, and which weights these are."""
    try:
        return dict(json.loads((folder / DESCRIPTION).read_text()))
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{folder / DESCRIPTION} cannot be read: {error}") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from its one file or from those that its index lists."""
    if not (folder / INDEX).exists():
        return _read_file(folder, WEIGHTS)
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    state: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise UserError(f"{INDEX} names {file}, which is outside of the folder")
        shard = _read_file(folder, file)
        if shard.keys() != {name for name, place in files.items() if place == file}:
            raise UserError(f"{file} does not hold the tensors that {INDEX} places there")
        state |= shard
    return state


def _read_file(folder: Path, name: str) -> dict[str, Tensor]:
    """One file of weights; compared with its hash, where one is known: a file may have come a long way."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    known = {file: digest for digest, file in read_hashes(folder / HASHES)}
    if name in known and sha256(folder / name) != known[name]:
        raise UserError(f"{name} is damaged: its SHA-256 is not the one in {HASHES}; copy it again")
    try:
        return load_file(folder / name)
    except SafetensorError as error:
        raise UserError(f"{name} is damaged: {error}") from error


def readme(model: GenerativeModel, dtype: DType = "float32") -> str:
    """What somebody who has the folder alone needs to know of shapes, labels, time, path and prediction."""
    labels = "It is unconditional."
    if model.num_classes is not None:
        known = ", ".join(f"{label} {name}" for label, name in enumerate(model.class_names or ()))
        known = f" ({known})" if known else ""
        labels = f"It knows the classes 0 to {model.num_classes - 1}{known}; label {model.null_label} stands for none."
    stored = "" if dtype == "float32" else f" Its weights are stored in {dtype} and loaded as float32."
    parts = [(descriptions.describe(part), inspect.getdoc(part)) for part in (model.path, model.prediction)]
    meanings = "\n\n".join(f"`{_written(description)}`\n\n{meaning or ''}" for description, meaning in parts)
    foreign = {path.partition(".")[0] for path in descriptions.class_paths(descriptions.describe(model))}
    trust = ", ".join(f'"{package}"' for package in sorted(foreign - {"fmlit", "diffusers"}))
    load = f'fmlit.load(".", trust=[{trust}])' if trust else 'fmlit.load(".")'
    diffusers = _with_diffusers(model) if isinstance(model.net, UNet) else ""
    return f"""# A generative model

Made with fmlit {fmlit.__version__}. Samples have shape {model.shape}; images lie in [-1, 1]. {labels}{stored}

Time runs from t = 0, noise, to t = 1, data: `x_t = alpha(t) z + beta(t) eps`, with z the data and eps standard normal \
noise.

{meanings}

```python
import fmlit

model = {load}
samples = fmlit.sample(model, n=16)
```
{diffusers}"""


def _written(description: dict[str, Any]) -> str:
    """A description as the call that builds it."""
    name = description["class_path"].removeprefix("fmlit.")
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in description['init_args'].items())})"


def _with_diffusers(model: GenerativeModel) -> str:
    """How diffusers evaluates the network, and where that is a velocity, how Euler's method makes samples of it."""
    shape = ", ".join(str(side) for side in (16, *model.shape))
    labels, argument = "", ""
    if model.num_classes is not None:
        labels, argument = "labels = torch.zeros(16, dtype=torch.int64)\n", ", labels"
    call = f"unet(x, {TIME_SCALE:g} * t{argument}).sample"
    use = f"t = torch.full((16,), 0.5)\noutput = {call}  # F at x and t"
    if isinstance(model.prediction, Velocity):
        use = f"""for i in range(50):
    t = torch.full((16,), i / 50)
    with torch.no_grad():
        x = x + {call} / 50"""
    return f"""
The network itself is in {DIFFUSERS}/, and is given the time t as {TIME_SCALE:g} t.

```python
import torch
from diffusers import UNet2DModel

unet = UNet2DModel.from_pretrained("{DIFFUSERS}").eval()
x = torch.randn({shape})
{labels}{use}
```
"""
