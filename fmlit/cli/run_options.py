"""The options of a run that belong to no class, and the Trainer options that are not offered."""

from dataclasses import dataclass
from typing import Literal

# Trainer options that would be accepted and then ignored: the stream of batches is endless and its length is in images,
# there is no validation loop, and run folder, checkpoints and their hash are ours.
MANAGED_TRAINER_OPTIONS = {
    *("default_root_dir", "enable_checkpointing", "enable_model_summary", "enable_autolog_hparams", "model_registry"),
    *("use_distributed_sampler", "reload_dataloaders_every_n_epochs", "inference_mode", "barebones", "fast_dev_run"),
    *("max_epochs", "min_epochs", "min_steps", "limit_train_batches", "overfit_batches"),
    *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "num_sanity_val_steps"),
    *("val_check_interval", "check_val_every_n_epoch"),
}


@dataclass
class RunOptions:
    """The run.

    Args:
        name: Name of the run (default: the name of the YAML file).
        runs: Folder of all runs; ~ and $VAR are expanded.
        resume: Go on with the newest run of this name; auto: if there is one, for jobs that are started again.
        start_from: Start a new run from trained weights: a checkpoint (its first average), the folder of a run, or one
            that was exported. A resumed run does not read it.
        images: Run length in training images.
        lease_expiry: Seconds without a sign of life after which the launch that owns the run folder counts as lost.
        lease_wait: Seconds to wait if another launch works in the run folder. 0 gives up as soon as it
            is known to be alive.
        seed_everything: Seed of everything that is drawn.
    """

    name: str | None = None
    runs: str = "runs"
    resume: bool | Literal["auto"] = False
    start_from: str | None = None
    images: int = 1_000_000
    lease_expiry: float = 120.0
    lease_wait: float = 0.0
    seed_everything: int = 0
