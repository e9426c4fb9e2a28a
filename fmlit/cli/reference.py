"""``fmlit reference``: the statistics of real images that scores are taken against."""

from pathlib import Path
from typing import Any

from fmlit.cli.scoring_options import ScoringOptions
from fmlit.core.files import expand


def reference(checkpoint: str | None = None, scoring: ScoringOptions = ScoringOptions()) -> dict[str, Any] | None:
    """Compute and cache the statistics of real images, so that later scores find them there.

    Other commands compute missing statistics themselves. Under torchrun, all processes share the work. The last line
    of output is JSON, with the path of each file.

    Args:
        checkpoint: A checkpoint, or the folder of a run, whose training data are the real images; or give data.
        scoring: The real images, and the features that their statistics are of.

    Returns:
        The summary; None on every rank but the first.
    """
    with scoring.scorer((), checkpoint) as scorer:
        paths = [str(Path(expand(scorer.cache), statistics.identity.filename)) for statistics in scorer.references]
        return None if scorer.ranks.rank else {"references": paths}
