"""``evaluate``: scores of a checkpoint over a sweep of samplers."""

import itertools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fmlit.cli.options import Integers, Names, Numbers, as_interval, load_guide
from fmlit.cli.scoring_options import ScoringOptions
from fmlit.core.errors import UserError
from fmlit.evaluation.measurements import LikelihoodMeasurement, SampleMeasurement, ScoredModel
from fmlit.evaluation.reports import report
from fmlit.evaluation.results import Measurement, Results
from fmlit.evaluation.scoring import METRICS
from fmlit.flows.diffusions import Diffusion
from fmlit.models.compilation import CompileMode, compile_net
from fmlit.sampling.build import build_sampler
from fmlit.sampling.grids import Grid
from fmlit.sampling.guidance import WHOLE_CLOCK
from fmlit.sampling.samplers import Precision, Sampler
from fmlit.solvers.records import Option
from fmlit.storage.loading import find_model, load, weights_of
from fmlit.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Sweep:
    """The samplers: every combination of solvers, steps and guidance scales.

    Args:
        solver: Solvers by name: heun, euler, unipc, dpmpp_2m, euler_maruyama, ...; docs/solvers.md lists all.
        solver_options: Options of the solvers, such as --solver_options.order 3 for unipc; docs/solvers.md lists them.
        steps: Numbers of steps, such as 5,10,20; by default 18, 250 for an SDE, 128 for churn.
        guidance: Scales of guidance, such as 1.0,1.5; 1 disables it. Classifier-free unless there is a guide.
        guidance_interval: Range of t in which guidance acts, from 0 (noise) to 1 (data), such as 0.2,0.8.
        grid: Where the steps lie.
        sigma: Diffusion coefficient of an SDE: a number, or a class.
        guide: Checkpoint of a weaker model of the same data (smaller, or less trained) for autoguidance.
        precision: Of the network: float32, or bfloat16, which is faster on GPUs.
        neighbors: Draw this many samples beside the training images nearest to them into neighbors-*.png.
        save_images: Folder that gets a folder of PNGs for each combination, for other tools.
    """

    solver: Names = Names(["heun"])
    solver_options: dict[str, Option] | None = None
    steps: Integers | None = None
    guidance: Numbers = Numbers([1.0])
    guidance_interval: Numbers = Numbers(WHOLE_CLOCK)
    grid: Grid | None = None
    sigma: Diffusion | float | None = None
    guide: str | None = None
    precision: Precision = "float32"
    neighbors: int = 0
    save_images: str | None = None

    def __post_init__(self) -> None:
        if self.neighbors < 0:
            raise UserError(f"neighbors must be a number of samples, got {self.neighbors}")

    @property
    def changed(self) -> list[str]:
        """Names of the options that do not have their default value."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]

    def samplers(self) -> list[Sampler]:
        """The sampler of each combination."""
        interval = as_interval(self.guidance_interval)
        if set(self.guidance) == {1} and interval != WHOLE_CLOCK:
            raise UserError("guidance_interval has no effect with guidance 1: set --guidance, too")
        return [
            build_sampler(solver, steps, self.grid, guidance, self.sigma, self.precision, interval, self.solver_options)
            for solver, steps, guidance in itertools.product(self.solver, self.steps or [None], self.guidance)
        ]


def evaluate(
    checkpoint: str,
    n: int = 5000,
    metrics: Names = Names(["fid", "kid"]),
    weights: str = "ema",
    seed: int = 0,
    compile: CompileMode | None = None,
    out: str | None = None,
    wandb: str | None = None,
    sweep: Sweep = Sweep(),
    scoring: ScoringOptions = ScoringOptions(),
) -> dict[str, Any] | None:
    """Score a model, for every combination of solvers, steps and guidance scales.

    Each combination becomes a line of results.jsonl in the output folder, with everything that it depends on. Lines
    that are there already are not computed again. At the end, table.md and plot.png are written. Under torchrun, all
    processes share the work, and the images are the same for any number of them. The last line of output is JSON.

    Args:
        checkpoint: A checkpoint, the folder of a run, or an exported folder (which needs --data).
        n: Number of samples. Cite FID at 50000; compare values at equal n only.
        metrics: Any of fid, kid, precision, recall; class, the share of samples that a classifier of the real images
            reads as the class that was asked for; bpd, bits per dimension of at most n test images.
        weights: ema for the first average, raw for the trained weights, or the name of an average.
        seed: Of the samples.
        compile: Mode of torch.compile for the network: default, max-autotune, ...; by default it runs plainly.
        out: Folder of the results; by default evaluation/ in the run folder.
        wandb: Project of Weights & Biases to send table and plot to.
        sweep: The samplers.
        scoring: The real images, and how the samples are compared with them.

    Returns:
        The summary; None on every rank but the first.
    """
    file = find_model(checkpoint, "checkpoint")
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise UserError(f"unknown metric {unknown[0]!r}: choose from {', '.join(METRICS)}")
    draws = set(metrics) != {"bpd"}
    if not draws and sweep.changed:
        raise UserError(f"--{sweep.changed[0]} has no meaning with --metrics bpd, which draws no samples: leave it out")
    samplers = sweep.samplers() if draws else []
    with scoring.scorer(metrics, file) as scorer:
        results = Results(Path(out) if out else RunFolder.of_checkpoint(file).evaluation)
        weights = weights_of(file, weights)
        model = load(file, weights, scoring.trust, scorer.device).requires_grad_(False)
        guide = load_guide(sweep.guide, scoring.trust, scorer.device)
        for part in (model, guide):
            if compile and part:
                compile_net(part.requires_grad_(False).net, compile)
        scored = ScoredModel(model, weights, scorer, n, seed, guide)
        pngs = Path(sweep.save_images) if sweep.save_images else None
        measurements: list[Measurement] = [
            SampleMeasurement(scored, sampler, results.folder, sweep.neighbors, pngs) for sampler in samplers
        ]
        if "bpd" in metrics:
            measurements.append(LikelihoodMeasurement(scored))
        return report(results, measurements, scorer.ranks, wandb)
