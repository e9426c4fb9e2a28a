"""``fmlit export``: a trained model for others to use without its checkpoint."""

from typing import Any

from fmlit.cli.options import Names
from fmlit.core.files import expand, new_folder
from fmlit.storage import checkpoints, exports
from fmlit.storage.exports import DType, save
from fmlit.storage.loading import find_model, load, weights_of
from fmlit.storage.run_folder import RunFolder


def export(
    checkpoint: str,
    weights: str = "ema",
    out: str | None = None,
    dtype: DType = "float32",
    shard_mb: int | None = None,
    trust: Names = Names(),
) -> dict[str, Any]:
    """Write a trained model into a folder, for others to use without the checkpoint.

    The folder holds model.safetensors and model.json, from which fmlit.load builds the model, a README,
    SHA256SUMS of the weights, and for a UNet the folder diffusers/, which diffusers.UNet2DModel.from_pretrained loads.
    The last line of output is JSON.

    Args:
        checkpoint: A checkpoint, the folder of a run, or an exported folder.
        weights: ema for the first average, raw for the trained weights, or the name of an average.
        out: The folder, which must be new; by default export/ in the run folder.
        dtype: In which weights are stored. Half precision halves the files; they are loaded as float32.
        shard_mb: Megabytes of weights per file, with an index beside them (default: one file).
        trust: Packages besides fmlit whose classes the checkpoint may name.
    """
    file = find_model(checkpoint, "checkpoint")
    weights = weights_of(file, weights)
    folder = expand(out, "out") if out else RunFolder.of_checkpoint(file).export
    model = load(file, weights, trust)
    origin = exports.read_description(file) if file.is_dir() else checkpoints.load(file)
    with new_folder(folder) as partial:
        save(model, partial, {"weights": weights, "images_seen": origin.get("images_seen")}, dtype, shard_mb)
        written = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    parameters = sum(parameter.numel() for parameter in model.net.parameters())
    return {"folder": str(folder), "weights": weights, "dtype": dtype, "parameters": parameters, "files": written}
