"""``fmlit score``: scores of anybody's pictures."""

from typing import Any

from fmlit.cli.options import Names
from fmlit.cli.scoring_options import ScoringOptions
from fmlit.core.errors import UserError
from fmlit.core.files import expand
from fmlit.evaluation.measurements import ImageMeasurement
from fmlit.evaluation.reports import report
from fmlit.evaluation.results import Results
from fmlit.evaluation.scoring import MODEL_METRICS
from fmlit.metrics.image_quality import check_metrics


def score(
    images: str,
    checkpoint: str | None = None,
    metrics: Names = Names(["fid", "kid"]),
    reference: str | None = None,
    out: str = "evaluation",
    wandb: str | None = None,
    scoring: ScoringOptions = ScoringOptions(),
) -> dict[str, Any] | None:
    """Score pictures, whoever made them, against the images of a data set, or against a reference file.

    The scores become a line of results.jsonl in the output folder, and table.md. Pictures of another size than the
    real images are refused, not resized. Under torchrun, all processes share the work. The last line of output is JSON.

    Args:
        images: A folder of pictures, or an .npz (arr_0, uint8, N x H x W x C).
        checkpoint: A checkpoint, or the folder of a run, whose training data are the real images; or give data, or a
            reference.
        metrics: Any of fid, kid, precision, recall.
        reference: An .npz to compare with in place of a data set: mu and sigma, or pictures in arr_0.
        out: Folder of the results.
        wandb: Project of Weights & Biases to send the table to.
        scoring: The real images, and how the pictures are compared with them.

    Returns:
        The summary; None on every rank but the first.
    """
    if of_models := [metric for metric in metrics if metric in MODEL_METRICS]:
        raise UserError(f"metric {of_models[0]} needs a model, and pictures come without one: use evaluate")
    check_metrics(metrics)
    with scoring.scorer(metrics, checkpoint, reference) as scorer:
        measurement = ImageMeasurement(scorer, str(expand(images, "images")))
        return report(Results(expand(out, "out")), [[measurement]], scorer.ranks, wandb)
