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
from fmlit.training.callbacks.checkpoint import Checkpoint
from fmlit.training.modules import GenerativeModule

# What is asked for, the stronger last: SIGTERM ends a job for whatever reason, and SIGUSR1 is what a Slurm script asks
# for before the time limit. Only the latter is requeued from here: a job that was cancelled must not come back, and one
# that is preempted to be requeued comes back by itself.
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


class Preemption(pl.Callback):
    """On SIGTERM or SIGUSR1 to any rank: a checkpoint after the current step, on SIGUSR1 ``scontrol requeue``, the end.

    Signals only set a flag. Every ``check_every`` steps the ranks take the strongest over a process group of their own
    on gloo, so that no accelerator waits for it; then all of them save between two steps, when everything is in place.
    Lightning saves, and talks to other ranks, inside its signal handlers, which hangs or corrupts where a signal comes
    at the wrong moment, and broadcasts in every step, which stalls the accelerator's queue.

    Args:
        check_every: interval in steps.
    """

    def __init__(self, check_every: int = 10) -> None:
        if check_every < 1:
            raise UserError(f"preemption.check_every must be at least 1 step, got {check_every}")
        self.check_every = check_every
        self._received = 0
        self._ranks: ProcessGroup | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals note of from now on, also while Lightning sets up; the previous handlers return at the end."""
        before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS[1:]}
        self._install()
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                for name, handler in before.items():
                    signal.signal(getattr(signal, name), handler)

    def _install(self) -> None:
        if threading.current_thread() is threading.main_thread():  # handlers of others are not ours to set
            for name in SIGNALS[1:]:
                signal.signal(getattr(signal, name), self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = max(self._received, SIGNALS.index(signal.Signals(number).name))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Before data are read, where one rank may fail and leave while others would still be connecting.
        if dist.is_available() and dist.is_initialized():
            self._ranks = ProcessGroup(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))
            self._ranks.gather_objects(None)  # all are connected
        else:
            self._ranks = ProcessGroup()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install()  # again, in place of what Lightning has put there; it restores what it found
        if trainer.world_size > 1:
            # Its broadcast of a flag that is never set now, in every step, with a wait for the device.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, GenerativeModule)
        if trainer.fit_loop._should_accumulate() or trainer.global_step % self.check_every:
            return
        if trainer.global_step < trainer.max_steps and (asked := self._agreed()):
            raise Preempted(SIGNALS[asked], self._leave(trainer, pl_module, asked == REQUEUE))

    def _agreed(self) -> int:
        assert self._ranks is not None
        return max(self._ranks.gather_objects(self._received))

    def _leave(self, trainer: pl.Trainer, module: GenerativeModule, requeue: bool) -> str:
        """Save, close the logs, requeue; all of it done when the first rank ends. Returns what was done, in words."""
        assert self._ranks is not None
        checkpoints: list[Checkpoint] = [c for c in trainer.callbacks if isinstance(c, Checkpoint)]  # type: ignore[attr-defined]
        saved = checkpoints[0].now(trainer, module) if checkpoints else None

        def close() -> str:
            for logger in trainer.loggers:
                if hasattr(logger, "mark_preempting"):
                    logger.mark_preempting()
                logger.finalize("failed")
            return _requeue() if requeue else "--resume goes on"

        # The launcher kills all processes once the first has ended: rank 0 must not be in the middle of this then.
        how = self._ranks.from_first(close)
        return f"saved {saved}; {how}" if saved else f"nothing was saved, as the run has no checkpoints; {how}"


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
