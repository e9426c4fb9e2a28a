"""Preemption: a signal asks for it, all ranks agree on it, and the run ends with a checkpoint to go on from."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from fmlit.core.errors import UserError
from fmlit.core.processes import ProcessGroup
from fmlit.training.hooks import Callback
from fmlit.training.lightning_internals import is_accumulating, skip_signal_broadcast
from fmlit.training.modules import GenerativeModule

# The stronger signal stands last. SIGTERM ends a job for whatever reason. A Slurm script asks for SIGUSR1 before the
# time limit. Only then does the job requeue itself: a cancelled job must not come back, and Slurm requeues a preempted
# one.
SIGNALS = ("", "SIGTERM", "SIGUSR1")
REQUEUE = SIGNALS.index("SIGUSR1")


class Preempted(Exception):
    """Training was ended by a signal, after a checkpoint.

    Attributes:
        signal: its name.
        outcome: where the checkpoint is, and who starts the run again.
    """

    def __init__(self, signal: str, outcome: str) -> None:
        super().__init__(f"{signal}: {outcome}")
        self.signal, self.outcome = signal, outcome


class Preemption(Callback):
    """On SIGTERM or SIGUSR1 to any rank, save a checkpoint after the current step and end the run.

    On SIGUSR1 the Slurm job is requeued as well.

    A signal only sets a flag. Every ``check_every`` steps the ranks agree on the strongest signal over a process group
    of their own on gloo, so that no accelerator waits for it. Then all of them save between two steps, when everything
    is in place. Lightning saves, and talks to other ranks, inside its signal handlers, which hangs or corrupts where a
    signal comes at the wrong moment. It also broadcasts in every step, which stalls the accelerator's queue.

    Args:
        check_every: interval in steps.
    """

    def __init__(self, check_every: int = 10) -> None:
        if check_every < 1:
            raise UserError(f"preemption.check_every must be at least 1 step, got {check_every}")
        self.check_every = check_every
        self._received = 0
        self._ranks = ProcessGroup()

    @contextlib.contextmanager
    def watch_signals(self) -> Iterator[None]:
        """Note signals during the block, also while Lightning sets up. The previous handlers return at its end."""
        before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS[1:]}
        self._install()
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                for name, handler in before.items():
                    signal.signal(getattr(signal, name), handler)

    def _install(self) -> None:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for name in SIGNALS[1:]:
                signal.signal(getattr(signal, name), self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = max(self._received, SIGNALS.index(signal.Signals(number).name))

    def setup(self, trainer: pl.Trainer, pl_module: GenerativeModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Before data are read, where one rank may fail and leave while others would still be connecting.
        self._ranks = ProcessGroup()
        if dist.is_available() and dist.is_initialized():
            self._ranks = ProcessGroup(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))
            self._ranks.gather_objects(None)  # all are connected

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self._install()  # again, in place of Lightning's handlers, which restore at the end what they found
        if trainer.world_size > 1:
            skip_signal_broadcast(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: GenerativeModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_accumulating(trainer) or trainer.global_step % self.check_every:
            return
        if trainer.global_step < trainer.max_steps:
            strongest = max(self._ranks.gather_objects(self._received))
            if strongest:
                raise Preempted(SIGNALS[strongest], self._leave(trainer, pl_module, strongest == REQUEUE))

    def _leave(self, trainer: pl.Trainer, module: GenerativeModule, requeue: bool) -> str:
        """Save, close the logs, and requeue, before the first rank ends. Returns what was done, in words."""
        checkpoints = module.run.checkpoints
        saved = checkpoints.save_now(trainer, module) if checkpoints else None

        def close() -> str:
            for logger in trainer.loggers:
                if hasattr(logger, "mark_preempting"):
                    logger.mark_preempting()
                logger.finalize("failed")
            return _requeue() if requeue else "--resume goes on"

        # The launcher kills all processes once the first has ended: rank 0 must not be in the middle of this then.
        next_start = self._ranks.from_first(close)
        return (
            f"saved {saved}; {next_start}"
            if saved
            else f"nothing was saved, as the run has no checkpoints; {next_start}"
        )


def _requeue() -> str:
    """Ask Slurm to start this job again; says what came of it."""
    environment = os.environ
    job = environment.get("SLURM_JOB_ID")
    if not job:
        return "not requeued, as this is no Slurm job; --resume goes on"
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    if shutil.which("scontrol") is None:
        return f"job {job} is not requeued: there is no scontrol here; sbatch it again, with --resume"
    try:
        answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} is not requeued: {error}; sbatch it again, with --resume"
    if answer.returncode:
        said = " ".join((answer.stderr or answer.stdout).split()) or f"exit code {answer.returncode}"
        return f"job {job} is not requeued: scontrol said: {said}; sbatch it again, with --resume"
    return f"job {job} is requeued"
