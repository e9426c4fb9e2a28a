"""``scripts/evaluate.py``: scores of a checkpoint over a sweep of samplers, or of anybody's pictures."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fmlit.cli.options import Integers, Names, Numbers, build_sampler, choose_device, load_guide, processes
from fmlit.core.errors import UserError
from fmlit.core.processes import ProcessGroup
from fmlit.data import DataModule
from fmlit.data.stores import warn_of_uneven_classes
from fmlit.evaluation import reports
from fmlit.evaluation.measurements import Cell, ModelCells, images_cell
from fmlit.evaluation.reports import Record, Results
from fmlit.evaluation.scoring import METRICS, Scorer, choose_features
from fmlit.flows.diffusions import Diffusion
from fmlit.metrics import Features
from fmlit.models.compilation import CompileMode, compile_net
from fmlit.sampling.grids import Grid
from fmlit.sampling.samplers import Precision
from fmlit.storage.loading import load_model, training_data
from fmlit.storage.run_folder import RunFolder, find_checkpoint


def evaluate(
    checkpoint: str | None = None,
    images: str | None = None,
    reference_only: bool = False,
    data: DataModule | None = None,
    n: int | None = None,
    metrics: Names | None = None,
    features: Literal["inception", "pixels"] | Features | None = None,
    splits: Names = Names(["train"]),
    flip: bool = False,
    solver: Names | None = None,
    steps: Integers | None = None,
    guidance: Numbers | None = None,
    grid: Grid | None = None,
    sigma: Diffusion | float | None = None,
    guide: str | None = None,
    precision: Precision | None = None,
    compile: CompileMode | None = None,
    weights: str | None = None,
    seed: int | None = None,
    batch_size: int = 250,
    neighbours: int = 0,
    save_images: str | None = None,
    out: str | None = None,
    wandb: str | None = None,
    cache: str = "data/statistics",
    trust: Names = Names(),
    device: str = "auto",
) -> dict[str, Any] | None:
    """Score a checkpoint, for every combination of solvers, steps and guidance scales.

    Each combination becomes a line of results.jsonl in the output folder, with everything that it depends on; those
    that are there already are not computed again. At the end table.md and plot.png are written. Under torchrun all
    processes share the work, and the images are the same for any number of them. The last line of output is JSON.

    Args:
        checkpoint: A checkpoint, or the folder of a run.
        images: A folder of pictures or an .npz (arr_0, uint8, N x H x W x C) to score instead of samples.
        reference_only: Only compute and cache the statistics of the real images.
        data: The real images; by default those that the checkpoint was trained on.
        n: Number of samples, default 5000. Cite FID at 50000; compare values at equal n only.
        metrics: Any of fid, kid, precision, recall; class, the share of samples that a classifier of the real images
            reads as the class that was asked for; bpd, bits per dimension of at most n test images. Default fid,kid.
        features: In which distances are taken: inception (of FID), pixels, or a class of features. By default pixels
            for images with a side below 32 pixels, and inception for all others.
        splits: Parts of the data to compare with: train, or train,test, where a gap shows memorization.
        flip: Compare with the real images and their mirror images.
        solver: Solvers by name: heun (default), euler, unipc, dpmpp_2m, euler_maruyama, ...
        steps: Numbers of steps, such as 5,10,20; by default 18, 250 for an SDE, 128 for churn.
        guidance: Scales of guidance, such as 1.0,1.5; 1 (default) is none. Classifier-free unless there is a guide.
        grid: Where the steps lie.
        sigma: Diffusion coefficient of an SDE: a number, or a class.
        guide: Checkpoint of a weaker model of the same data (smaller, or less trained) for autoguidance.
        precision: Of the network: float32 (default), or bfloat16, which is faster on GPUs.
        compile: Mode of torch.compile for the network: default, max-autotune, ...; by default it runs plainly.
        weights: ema (default) for the first average, raw for the trained weights, or the name of an average.
        seed: Of the samples, default 0.
        batch_size: Samples per batch and process.
        neighbours: Draw this many samples beside the training images nearest to them into neighbours-*.png.
        save_images: Folder that gets a folder of PNGs for each combination, for other tools.
        out: Folder of the results; by default evaluation/ in the run folder, or where no checkpoint is given, here.
        wandb: Project of Weights & Biases to send table and plot to.
        cache: Folder of the statistics of real images.
        trust: Packages besides fmlit whose classes a checkpoint may name.
        device: auto, cpu, cuda, cuda:1, ...
    """
    sampling: dict[str, Any] = {"solver": solver, "steps": steps, "guidance": guidance, "grid": grid, "sigma": sigma}
    sampling |= {"guide": guide, "precision": precision}
    sampling |= {"neighbours": neighbours or None, "save_images": save_images}
    model = {"n": n, "weights": weights, "seed": seed, "compile": compile, **sampling}
    if neighbours < 0:
        raise UserError(f"neighbours must be a number of samples, got {neighbours}")
    chosen = _check_metrics(metrics or ["fid", "kid"], images is not None)
    if reference_only:
        _refuse("reference_only", {"images": images, "metrics": metrics, "out": out, "wandb": wandb, **model})
    elif images is not None:
        _refuse("images", model)
    elif checkpoint is None:
        raise UserError("give a --checkpoint to sample from, or --images to score")
    elif set(chosen) == {"bpd"}:
        _refuse("metrics bpd, which draws no samples", sampling)

    file = None if checkpoint is None else find_checkpoint(checkpoint)
    where = choose_device(device)
    with processes(where) as ranks:
        data = data or training_data(file, trust)
        if len(data.shape) != 3:
            raise UserError(f"evaluation is of images, and {type(data).__name__} holds vectors of shape {data.shape}")
        ranks.from_first(data.prepare_data)
        wanted = choose_features(features, data.shape)
        scorer = Scorer(data, chosen, wanted, splits, flip, cache, batch_size, where, ranks)
        if reference_only:
            paths = [str(Path(cache, reference.identity.filename)) for reference in scorer.references]
            return {"references": paths} if ranks.rank == 0 else None

        run = RunFolder(Path()) if file is None or images else RunFolder.of_checkpoint(file)
        folder = Path(out) if out else run.evaluation
        results = Results(folder)
        if images is not None:
            cells = [images_cell(scorer, images)]
        else:
            assert file is not None
            loaded = load_model(file, weights or "ema", trust, where).requires_grad_(False)
            if loaded.num_classes is not None and scorer.distances:
                warn_of_uneven_classes(data.dataset(scorer.splits[0]))  # type: ignore[arg-type]  # it checks
            weaker = load_guide(guide, trust, where)
            for part in (loaded, weaker):
                if compile and part:
                    compile_net(part.requires_grad_(False).net, compile)
            of_model = ModelCells(loaded, weights or "ema", scorer, 5000 if n is None else n, seed or 0, weaker)
            solvers = [] if set(chosen) == {"bpd"} else solver or ["heun"]
            sweep = itertools.product(solvers, steps or [None], guidance or [1.0])
            samplers = [
                build_sampler(name, count, grid, scale, sigma, precision or "float32") for name, count, scale in sweep
            ]
            for sampler in samplers:
                sampler.check(loaded, weaker)
            saved = Path(save_images) if save_images else None
            cells = [of_model.samples(sampler, folder, neighbours, saved) for sampler in samplers]
            cells += [of_model.likelihood()] if "bpd" in chosen else []
        records = [_result(cell, results, ranks) for cell in cells]
        return _report(records, results.path, wandb, folder.absolute().parent.name) if ranks.rank == 0 else None


def _refuse(what: str, options: Mapping[str, Any]) -> None:
    """An option that has no effect is a misunderstanding."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"--{given[0]} has no meaning with --{what}: leave one of them out")


def _check_metrics(metrics: Sequence[str], of_images: bool) -> Sequence[str]:
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"unknown metric {metric!r}: choose from {', '.join(METRICS)}")
        if of_images and metric in ("class", "bpd"):
            raise UserError(f"metric {metric} asks the model, and --images have none: score a --checkpoint")
    return metrics


def _result(cell: Cell, results: Results, ranks: ProcessGroup) -> Record:
    """The cell's record, from an earlier evaluation or measured now; one line of output."""
    record = ranks.from_first(lambda: results.find(cell.identity) if all(f.exists() for f in cell.files) else None)
    known = record is not None
    if record is None:
        outcome = cell.measure()
        record = ranks.from_first(lambda: results.add(cell.identity, outcome))
    if ranks.rank == 0:
        scores = "  ".join(f"{name} {value:.4g}" for name, value in record["scores"].items())
        print(f"{record['name']}: {scores}  ({'known' if known else _cost(record)})", flush=True)
    return record


def _cost(record: Record) -> str:
    if "cost" not in record:  # that of distances
        return f"{record['seconds']} s"
    a_thousand, memory = record["cost"]["seconds_per_1000"], record["cost"]["peak_memory_gb"]
    return f"{record['seconds']} s; {a_thousand:.3g} s per 1,000 images, peak memory {memory:.2f} GB"


def _report(records: list[Record], results: Path, project: str | None, name: str) -> Record:
    """Table, plot and W&B of these records; the summary."""
    text = reports.markdown(reports.table(records))
    (results.parent / "table.md").write_text(text)
    print(f"\n{text}")
    drawn = [record for record in records if "nfe" in record]
    picture = results.parent / "plot.png" if drawn else None
    if picture is not None:
        reports.plot(drawn, picture)
    if project is not None:
        reports.push(records, picture, project, results.parent, f"{name}-evaluation")
    shown = ("name", "weights", "n", "nfe", "protocol", "scores", "seconds", "cost")
    cells = [{key: record[key] for key in shown if key in record} for record in records]
    return {"results": str(results), "plot": str(picture) if picture else None, "cells": cells}
