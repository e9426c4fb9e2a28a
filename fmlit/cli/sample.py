"""``fmlit sample``: draw samples of a model."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmlit.cli.options import Names, choose_device
from fmlit.cli.sampling_options import SamplingOptions
from fmlit.core.errors import UserError
from fmlit.core.files import atomic_write, expand, file_errors, new_file, new_folder
from fmlit.core.progress import progress
from fmlit.core.randomness import image_seeds
from fmlit.core.tensors import to_uint8
from fmlit.data.image_files import save_npz, save_pngs
from fmlit.models.compilation import CompileMode
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.drawing import draw_samples, image_grid
from fmlit.sampling.generate import deal_labels, generate
from fmlit.sampling.samplers import SolverName
from fmlit.storage.loading import find_model, weights_of
from fmlit.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 10_000  # samples in the picture
MOST_COLUMNS = 16
STRIP_COLUMNS, STRIP_ROWS = 11, 10
ANIMATED = 100  # samples in a trajectory
FRAMES, FRAME_MS, LAST_FRAME_MS = 60, 60, 1500


@dataclass(frozen=True)
class SamplerOptions(SamplingOptions):
    """The sampler.

    Args:
        solver: Name of the solver; docs/solvers.md compares them.
        steps: Number of steps; by default 18, 250 for an SDE, 128 for churn.
        guidance: Scale of classifier-free guidance, or of autoguidance where there is a guide; 1 disables guidance.
    """

    solver: SolverName = "heun"
    steps: int | None = None
    guidance: float = 1.0


@dataclass(frozen=True)
class OutputFiles:
    """The files to write.

    Args:
        out: PNG file for the grid of samples, 10000 at most (a plot, if the model makes vectors); by default the next
            samples/drawn-001.png, drawn-002.png, ... in the run folder, or beside the checkpoint.
        columns: Images per row of the grid; by default one for each class, or as many as rows.
        save_images: Folder for a PNG of each sample, or an .npz file for all (arr_0: uint8, N x H x W x C).
        trajectory: File for the way of the first samples from noise to data: .png has a row of states for each, .gif is
            an animation.
    """

    out: str | None = None
    columns: int | None = None
    save_images: str | None = None
    trajectory: str | None = None

    def named(self, run_folder: RunFolder) -> "OutputFiles":
        """The same files, with a name for the picture."""
        paths = {name: getattr(self, name) for name in ("out", "save_images", "trajectory")}
        expanded: dict[str, Any] = {name: str(expand(path, name)) for name, path in paths.items() if path is not None}
        return replace(self, **{"out": str(run_folder.next_drawing()), **expanded})

    def check(self, shape: Sequence[int]) -> None:
        """Raise a UserError where a file cannot be written, or not of samples of this shape."""
        picture = new_file(str(self.out), ".png")
        if self.trajectory is None:
            return
        if new_file(self.trajectory, ".png", ".gif") == picture:
            raise UserError(f"out and trajectory are the same file {picture}: give them different names")
        if len(shape) != 3:
            raise UserError(
                f"trajectories can only be drawn for images, and this model makes vectors of shape {tuple(shape)}"
            )

    def written(self) -> dict[str, str]:
        """The files by what they hold."""
        files = {"picture": self.out, "images": self.save_images, "trajectory": self.trajectory}
        return {name: file for name, file in files.items() if file is not None}


def sample(
    checkpoint: str,
    n: int = 100,
    labels: Names | None = None,
    weights: str = "ema",
    seed: int = 0,
    batch_size: int = 250,
    compile: CompileMode | None = None,
    trust: Names = Names(),
    device: str = "auto",
    sampler: SamplerOptions = SamplerOptions(),
    files: OutputFiles = OutputFiles(),
) -> dict[str, Any]:
    """Draw samples of a trained model as a picture, and as files for other tools where asked.

    Image i depends on the seed and on i alone, so that a larger n adds images to the same first ones. The last line of
    output is JSON.

    Args:
        checkpoint: A checkpoint, the folder of a run, or an exported folder.
        n: Number of samples.
        labels: Classes, by id or by name: 3,7 or cat,dog. They are dealt in turn; by default all classes are.
        weights: ema for the first average, raw for the trained weights, or the name of an average.
        seed: Seed of the noise.
        batch_size: Samples at a time.
        compile: Mode of torch.compile for the network: default, max-autotune, ...; by default it runs plainly.
        trust: Packages besides fmlit whose classes the checkpoint may name.
        device: auto, cpu, cuda, cuda:1, ...
        sampler: The sampler.
        files: The files to write.
    """
    if n < 1 or batch_size < 1 or (files.columns is not None and files.columns < 1):
        raise UserError(f"n, batch_size and columns must be at least 1, got {n}, {batch_size} and {files.columns}")
    started = time.perf_counter()
    file = find_model(checkpoint, "checkpoint")
    weights, where = weights_of(file, weights), choose_device(device)
    (chosen,) = sampler.build([sampler.solver], [sampler.steps], [sampler.guidance])
    model, guide = sampler.load(file, weights, compile, trust, where)
    chosen.check(model, guide)
    files = files.named(RunFolder.of_checkpoint(file))
    files.check(model.shape)
    classes = choose_classes(model, labels)
    dealt, name = deal_labels(model, n, classes), chosen.named(guided=guide is not None)
    kinds = 0 if classes is None else len(classes)
    columns = files.columns or (kinds if 0 < kinds <= MOST_COLUMNS else math.isqrt(n - 1) + 1)

    with _files(files.save_images, vectors=len(model.shape) != 3) as save:
        size = min(batch_size, n)
        batches = generate(model, chosen, n, seed, size, dealt, guide=guide)
        samples = torch.cat([batch.cpu() for _, batch in progress(batches, math.ceil(n / size), name)])
        with file_errors(str(files.save_images)):
            save(samples, dealt)
    _write(draw_samples(samples[:SHOWN], columns), Path(str(files.out)))
    if files.trajectory is not None:
        indices = torch.arange(min(n, ANIMATED))
        first = None if dealt is None else dealt[: len(indices)]
        states = to_uint8(chosen.sample(model, image_seeds(seed, indices), first, True, guide)).cpu()
        draw_trajectory(states, Path(files.trajectory), columns)
    summary = {"n": n, "seed": seed, "weights": weights, "sampler": name}
    return {**files.written(), **summary, "seconds": round(time.perf_counter() - started, 2)}


def choose_classes(model: GenerativeModel, labels: Sequence[str] | None) -> Tensor | None:
    """Class ids, by the names of the model's classes, or as they are unless a name is a number too.

    All classes for None; None for a model without classes. Raises UserError for a class that there is not.
    """
    if model.num_classes is None:
        if labels:
            raise UserError(f"labels {','.join(labels)} were given, and this model has no classes: leave them out")
        return None
    if labels is None:
        return torch.arange(model.num_classes)
    names = model.class_names or ()
    ids = {name: class_id for class_id, name in enumerate(names)}
    if not any(name.isdecimal() for name in names):
        ids |= {str(class_id): class_id for class_id in range(model.num_classes)}
    for label in labels:
        if label not in ids:
            numbers = f"0 to {model.num_classes - 1}" if "0" in ids and "0" not in names else ""
            choices = ", or ".join(filter(None, [numbers, ", ".join(names)]))
            raise UserError(f"labels: there is no class {label!r} in this model; choose from {choices}")
    return torch.tensor([ids[label] for label in labels])


def draw_trajectory(states: Tensor, path: Path, columns: int) -> None:
    """From noise to data, as a .gif whose frames are grids, or as a picture with a row for each of the first samples.

    Args:
        states: uint8 (points, B, C, H, W).
        path: ending in .gif or .png.
        columns: pictures per row of a frame.
    """
    if path.suffix.lower() == ".gif":
        chosen = _spread(len(states), FRAMES)
        frames = [image_grid(states[i], columns) for i in chosen]
        durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
        _write(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    else:
        rows = states[_spread(len(states), STRIP_COLUMNS), :STRIP_ROWS].transpose(0, 1)
        _write(image_grid(rows.flatten(0, 1), rows.shape[1]), path)


def _spread(points: int, most: int) -> list[int]:
    """At most so many of the numbers 0 ... points - 1, evenly spread, with both ends."""
    return torch.linspace(0, points - 1, min(points, most)).round().long().tolist()


@contextmanager
def _files(path: str | None, vectors: bool) -> Iterator[Callable[[Tensor, Tensor | None], None]]:
    """What saves samples at ``path``; looked at before they are drawn, and there as a whole or not at all."""
    if path is None:
        yield lambda samples, labels: None
    elif Path(path).suffix == ".npz":
        with atomic_write(new_file(path, ".npz")) as file:
            yield lambda samples, labels: save_npz(file, samples if vectors else to_uint8(samples), labels)
    elif vectors:
        raise UserError(f"save_images {path} must end in .npz: this model makes vectors")
    else:
        with new_folder(Path(path)) as folder:
            yield lambda samples, labels: save_pngs(folder, to_uint8(samples))


def _write(picture: "Image", path: Path, **options: Any) -> None:
    with file_errors(path), atomic_write(path) as file:
        picture.save(file, path.suffix[1:], **options)
