"""Lightning callbacks: averages, samples, quality, checkpoints, logs, preemption; in images seen, not in steps."""

from fmlit.callbacks.checkpoint import Checkpoint
from fmlit.callbacks.ema import EMA
from fmlit.callbacks.preemption import Preempted, Preemption
from fmlit.callbacks.quality import QualityCurve
from fmlit.callbacks.samples import SampleGrid
from fmlit.callbacks.training_log import ProgressBar, TrainingLog

__all__ = ["EMA", "Checkpoint", "Preempted", "Preemption", "ProgressBar", "QualityCurve", "SampleGrid", "TrainingLog"]
