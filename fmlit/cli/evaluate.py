"""``evaluate``: scores of a checkpoint over a sweep of samplers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from fmlit.cli.options import Integers, Names, Numbers
from fmlit.cli.sampling_options import SamplingOptions
from fmlit.cli.scoring_options import ScoringOptions
from fmlit.core.errors import UserError
from fmlit.core.files import expand
from fmlit.core.randomness import image_seeds
from fmlit.evaluation.measurements import LikelihoodMeasurement, SampleMeasurement, ScoredModel
from fmlit.evaluation.reports import report
from fmlit.evaluation.results import Measurement, Results
from fmlit.evaluation.scoring import METRICS, MODEL_METRICS
from fmlit.models.compilation import CompileMode
from fmlit.storage.loading import find_model, weights_of
from fmlit.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Sweep(SamplingOptions):
    """The samplers: every combination of solvers, steps and guidance scales.

    Args:
        solver: Solvers by name: heun, euler, unipc, dpmpp_2m, euler_maruyama, ...; docs/solvers.md lists all.
        steps: Numbers of steps, such as 5,10,20; by default 18, 250 for an SDE, 128 for churn.
        guidance: Scales of guidance, such as 1.0,1.5; 1 disables it. Classifier-free unless there is a guide.
        neighbors: Draw this many samples beside the training images nearest to them into neighbors-*.png.
        save_images: Folder that gets a folder of PNGs for each combination, for other tools.
    """

    solver: Names = Names(["heun"])
    steps: Integers | None = None
    guidance: Numbers = Numbers([1.0])
    neighbors: int = 0
    save_images: str | None = None

    def __post_init__(self) -> None:
        if self.neighbors < 0:
            raise UserError(f"neighbors must be a number of samples, got {self.neighbors}")


def evaluate(
    checkpoint: str,
    n: int = 5000,
    metrics: Names = Names(["fid", "kid"]),
    reference: str | None = None,
    weights: Names = Names(["ema"]),
    seed: int = 0,
    draws: int = 1,
    compile: CompileMode | None = None,
    out: str | None = None,
    wandb: str | None = None,
    sweep: Sweep = Sweep(),
    scoring: ScoringOptions = ScoringOptions(),
) -> dict[str, Any] | None:
    """Score a model, for every combination of weights, solvers, steps and guidance scales.

    Each combination (and each draw of it) becomes a line of results.jsonl in the output folder, with everything that it
    depends on. Lines that are there already are not computed again. At the end, table.md and plot.png are written.
    Under torchrun, all processes share the work, and the images are the same for any number of them. The last line of
    output is JSON.

    Args:
        checkpoint: A checkpoint, the folder of a run, or an exported folder (which needs --data or --reference).
        n: Number of samples. Cite FID at 50000; compare values at equal n only.
        metrics: Any of fid, kid, precision, recall; class, the share of samples that a classifier of the real images
            reads as the class that was asked for; bpd, bits per dimension of at most n test images.
        reference: An .npz to compare with in place of a data set: mu and sigma, or pictures in arr_0.
        weights: ema for the first average, raw for the trained weights, or the name of an average; several as ema,raw.
        seed: Of the samples.
        draws: Number of independent sets of noise, from this seed and the next ones. The report shows mean, minimum and
            spread (standard deviation) of each score.
        compile: Mode of torch.compile for the network: default, max-autotune, ...; by default it runs plainly.
        out: Folder of the results; by default evaluation/ in the run folder.
        wandb: Project of Weights & Biases to send table and plot to.
        sweep: The samplers.
        scoring: The real images, and how the samples are compared with them.

    Returns:
        The summary; None on every rank but the first.
    """
    file = find_model(checkpoint, "checkpoint")
    _check(metrics, reference, sweep)
    if draws < 1:
        raise UserError(f"draws must be at least 1, got {draws}")
    image_seeds(seed + draws - 1, [])  # fails now, rather than after the draws before it
    draws_samples = set(metrics) != {"bpd"}
    samplers = sweep.build(sweep.solver, sweep.steps or [None], sweep.guidance) if draws_samples else []
    needs_data = reference is None or sweep.neighbors or set(metrics) & set(MODEL_METRICS)
    with scoring.scorer(metrics, checkpoint if needs_data else None, reference) as scorer:
        folder = expand(out, "out") if out else RunFolder.of_checkpoint(file).evaluation
        files = folder, sweep.neighbors, expand(sweep.save_images, "save_images") if sweep.save_images else None
        rows: list[list[Measurement]] = []
        for name in [weights_of(file, name) for name in weights]:
            model, guide = sweep.load(file, name, compile, scoring.trust, scorer.device)
            scored = [ScoredModel(model, name, scorer, n, seed + draw, guide) for draw in range(draws)]
            rows += [[SampleMeasurement(one, sampler, *files) for one in scored] for sampler in samplers]
            if "bpd" in metrics:
                rows.append([LikelihoodMeasurement(one) for one in scored])
        return report(Results(folder), rows, scorer.ranks, wandb)


def _check(metrics: Sequence[str], reference: str | None, sweep: Sweep) -> None:
    """Raise a UserError for unknown metrics, and for options that have no effect on these metrics."""
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise UserError(f"unknown metric {unknown[0]!r}: choose from {', '.join(METRICS)}")
    if reference is not None and set(metrics) <= set(MODEL_METRICS):
        raise UserError(f"--reference has no meaning with --metrics {','.join(metrics)}: leave it out")
    changed = [field.name for field in fields(sweep) if getattr(sweep, field.name) != field.default]
    if changed and set(metrics) == {"bpd"}:
        raise UserError(f"--{changed[0]} has no meaning with --metrics bpd, which draws no samples: leave it out")
