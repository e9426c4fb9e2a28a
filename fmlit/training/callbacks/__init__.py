"""Lightning callbacks: averages, samples, quality, checkpoints, logs, preemption; in images seen, not in steps."""

from fmlit.training.averages import EMA
from fmlit.training.callbacks.checkpoint import Checkpoint
from fmlit.training.callbacks.preemption import Preempted, Preemption
from fmlit.training.callbacks.quality_curve import QualityCurve
from fmlit.training.callbacks.sample_grid import SampleGrid
from fmlit.training.callbacks.training_log import ProgressBar, TrainingLog

__all__ = ["EMA", "Checkpoint", "Preempted", "Preemption", "ProgressBar", "QualityCurve", "SampleGrid", "TrainingLog"]
