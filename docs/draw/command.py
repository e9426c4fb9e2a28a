"""``scripts/figures.py``: the pictures of the documentation, the table of solver errors, the curves of runs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from docs.draw import floors, images, memorization, odes, picard, plane, sdes, solver_table, style, two_points, weights
from docs.draw.curves import read_metrics, training_curves
from docs.draw.oracle import checkerboard, exact_model
from fmlit.cli.options import Names
from fmlit.core.errors import UserError
from fmlit.core.files import new_file
from fmlit.flows.paths import CondOTPath, VPPath
from fmlit.models.generative_model import GenerativeModel
from fmlit.storage.loading import find_model, load
from fmlit.storage.run_folder import RunFolder

EXACT: dict[str, Callable[[], Figure]] = {
    "trajectory_field_ode": odes.trajectory_field_ode,
    "flow": odes.flow,
    "linear_ode": odes.linear_ode,
    "picard_lindeloef": picard.picard_lindeloef,
    "brownian_paths": sdes.brownian_paths,
    "linear_sde": sdes.linear_sde,
    "two_points": two_points.two_points,
    "plane_fields": plane.plane_fields,
    "plane_simulations": plane.plane_simulations,
    "gaussian_to_data": plane.gaussian_to_data,
    "loss_weights": weights.loss_weights,
    "noising": images.noising,
    "floors": floors.floors,
}
TRAINED: dict[str, Callable[[GenerativeModel], Figure]] = {
    "sampling_trajectories": images.sampling_trajectories,
    "digits_as_diracs": memorization.digits_as_diracs,
}
ANIMATED = "gaussian_to_data.gif"
PICTURES = (*(f"{name}.png" for name in (*EXACT, *TRAINED)), ANIMATED)


def figures(
    out: str = "docs/figures",
    only: Names | None = None,
    checkpoint: str | None = None,
    table: str | None = None,
    curves_of: Names | None = None,
) -> dict[str, Any]:
    """Draw the pictures of docs from the code itself, the loss curves of runs, or the table of solver errors.

    Args:
        out: Folder for the pictures; those of the same name are replaced.
        only: Some of the pictures, by file name: flow.png,gaussian_to_data.gif.
        checkpoint: A model of the digits, file or run folder (python scripts/train.py makes one in a minute). The
            pictures of a trained model are drawn where it is given, and the table gets a part for it.
        table: Write the errors of all solvers at 5, 10, 20 and 50 evaluations into this .md file, and draw no pictures.
            Takes two minutes for the exact fields and some ten more for the quickstart's network, on one core.
        curves_of: Draw the loss curves of these run folders, in total and per bin of t, into loss.png, and no more.
    """
    if sum(option is not None for option in (only, table, curves_of)) > 1:
        raise UserError("only, table and curves_of are three tasks: give one of them")
    if curves_of is not None:
        return _draw_curves(curves_of, Path(out))
    source = None if checkpoint is None else find_model(checkpoint, "checkpoint")
    if table is not None:
        return _write_table(new_file(table, ".md"), source)
    drawable = [name for name in PICTURES if source is not None or Path(name).stem not in TRAINED]
    chosen = list(only or drawable)
    for name in chosen:
        if name not in PICTURES:
            raise UserError(f"only: there is no picture {name}; choose from {', '.join(PICTURES)}")
        if name not in drawable:
            raise UserError(f"only: {name} shows a trained model; give --checkpoint")
    model = None if source is None else load(source)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        draw(name, folder, model)
        print(folder / name, file=sys.stderr, flush=True)
    return {"folder": out, "pictures": chosen, "left_out": [name for name in PICTURES if name not in chosen]}


def draw(name: str, folder: Path, model: GenerativeModel | None = None) -> None:
    """Draw the picture of this file name into a folder."""
    path, stem = folder / name, Path(name).stem
    if name == ANIMATED:
        style.save_gif(plane.gaussian_to_data_frames(), path, seconds=4)
    elif stem in EXACT:
        style.save_png(EXACT[stem](), path)
    else:
        assert model is not None
        style.save_png(TRAINED[stem](model), path)


def _draw_curves(runs: Names, folder: Path) -> dict[str, Any]:
    """``loss.png`` in the folder: a panel for each run."""
    try:
        metrics = {Path(run).name: read_metrics(RunFolder(Path(run)).metrics) for run in runs}
    except UserError as error:
        raise UserError(f"curves_of: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "loss.png"
    style.save_png(style.styled(training_curves)(metrics, style.TIME), picture)
    return {"picture": str(picture), "runs": list(runs)}


def _write_table(file: Path, checkpoint: Path | None) -> dict[str, Any]:
    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    title = "The exact field of a mixture, 128 Gaussians on a checkerboard, on the CondOT path"
    exact = {title: CondOTPath(), "The same on the VP path": VPPath()}
    tables = [
        solver_table.error_table(exact_model(checkerboard(4), path), title, n=1000, report=report)
        for title, path in exact.items()
    ]
    if checkpoint is not None:
        model = load(checkpoint)
        title = f"A trained network: {type(model.net).__name__} for data of shape {model.shape}"
        tables.append(solver_table.error_table(model, title, n=400, report=report))  # a network is slow
    file.write_text(solver_table.page(tables), encoding="utf-8")
    return {"table": str(file), "best": {made.title: made.best() for made in tables}}
