"""Preemption: a signal asks for it, all ranks agree on it, and the run ends with a checkpoint to go on from."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from fmlit.core.errors import UserError
from fmlit.core.processes import ProcessGroup
from fmlit.training.hooks import Callback
from fmlit.training.lightning_internals import is_accumulating, skip_signal_broadcast
from fmlit.training.modules import GenerativeModule
from fmlit.training.signals import end_at_second_signal, ignored, set_handlers

# The stronger signal stands last. SIGTERM ends a job for whatever reason. A Slurm script asks for SIGUSR1 before the
# time limit. Only then does the job requeue itself: a cancelled job must not come back, and Slurm requeues a preempted
# one.
BY_HAND = (signal.SIGHUP, signal.SIGINT)  # a lost terminal, Ctrl-C
SIGNALS = (*BY_HAND, signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """Training was ended by a signal, after a checkpoint.

    Attributes:
        signal: its name.
        outcome: where the checkpoint is, and who starts the run again.
        exit_code: 129 for SIGHUP and 130 for SIGINT, as in shells, else 143, which schedulers take for an ended job.
    """

    def __init__(self, received: signal.Signals, outcome: str) -> None:
        by_hand = received in BY_HAND
        super().__init__(f"{'interrupted' if by_hand else 'preempted'} by {received.name}: {outcome}")
        self.signal, self.outcome = received.name, outcome
        self.exit_code = 128 + (received if by_hand else signal.SIGTERM)


class Preemption(Callback):
    """On SIGTERM, SIGUSR1, SIGINT or SIGHUP to any rank, save a checkpoint between two steps and end the run.

    On SIGUSR1 the Slurm job is requeued as well. A second one of the other signals ends the process at once.

    A signal only sets a flag. A single process looks at it after each step. Several ranks look every ``check_every``
    steps, and agree on the strongest signal over a process group
    of their own on gloo, so that no accelerator waits for it. Then all of them save between two steps, when everything
    is in place. Lightning saves, and talks to other ranks, inside its signal handlers, which hangs or corrupts where a
    signal comes at the wrong moment. It also broadcasts in every step, which stalls the accelerator's queue.

    Args:
        check_every: interval in steps, where there are several processes.
    """

    def __init__(self, check_every: int = 10) -> None:
        if check_every < 1:
            raise UserError(f"preemption.check_every must be at least 1 step, got {check_every}")
        self.check_every = check_every
        self._received = -1  # the index of the strongest signal so far
        self._watched: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1)
        self._ranks = ProcessGroup()

    @contextlib.contextmanager
    def watch_signals(self, end: Callable[[int], object]) -> Iterator[None]:
        """Note signals during the block, also while Lightning sets up. The previous handlers return at its end.

        SIGINT and SIGHUP are noted only here: a program of the user's own keeps its Ctrl-C. One that is ignored, as
        under ``nohup``, stays ignored.

        Args:
            end: ends the process with an exit code at a second signal. A thread calls it.
        """
        self._watched = tuple(number for number in SIGNALS if not (number in BY_HAND and ignored(number)))
        before = {number: signal.getsignal(number) for number in self._watched}
        set_handlers(dict.fromkeys(self._watched, self._note))
        try:
            with end_at_second_signal("saving a checkpoint before the run ends; a second signal ends it at once", end):
                yield
        finally:
            set_handlers(before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = max(self._received, SIGNALS.index(signal.Signals(number)))

    def setup(self, trainer: pl.Trainer, pl_module: GenerativeModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Before data are read, where one rank may fail and leave while others would still be connecting.
        self._ranks = ProcessGroup.current()
        if self._ranks.size > 1:
            self._ranks = ProcessGroup.current(dist.new_group(backend="gloo"))
            self._ranks.gather_objects(None)  # all are connected

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        # Again, in place of Lightning's handlers, which restore at the end what they found.
        set_handlers(dict.fromkeys(self._watched, self._note))
        if trainer.world_size > 1:
            skip_signal_broadcast(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        step = trainer.global_step
        due = self._ranks.size == 1 or step % self.check_every == 0
        if due and step < trainer.max_steps and not is_accumulating(trainer):
            strongest = max(self._ranks.gather_objects(self._received))
            if strongest >= 0:
                received = SIGNALS[strongest]
                raise Preempted(received, self._leave(trainer, pl_module, received == signal.SIGUSR1))

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
        done = f"saved {saved}" if saved else "nothing was saved, as the run has no checkpoints"
        return f"{done}; {self._ranks.from_first(close)}"


def _requeue() -> str:
    """Ask Slurm to start this job again, and return the result in words."""
    environment = os.environ
    job = environment.get("SLURM_JOB_ID")
    if not job:
        return "not requeued, because this is not a Slurm job; --resume continues the run"
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=True)
        return f"job {job} is requeued"
    except FileNotFoundError:
        problem = "there is no scontrol here"
    except subprocess.CalledProcessError as error:
        answer = " ".join((error.stderr or error.stdout).split())
        problem = f"scontrol said: {answer or f'exit code {error.returncode}'}"
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    return f"job {job} is not requeued: {problem}; sbatch it again, with --resume"
