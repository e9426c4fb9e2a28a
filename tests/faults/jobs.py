"""Training commands as processes that can be signalled and killed: forked from one that has imported everything.

A fork starts in a tenth of the time of an interpreter. Several ranks are given the environment of torchrun.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fmlit.cli import train
from tests.helpers.small_runs import same
from tests.helpers.tiny_cli import Outcome

# Dropout: what a resume has to repeat besides noise, times and order.
RECIPE = """
images: 2400
model:
  class_path: fmlit.FlowMatchingModule
  init_args:
    net:
      class_path: fmlit.UNet
      init_args: {channels: 16, multipliers: [1, 2], blocks: 1, attention: [], head_channels: 16, dropout: 0.2}
    optimizer: {class_path: fmlit.AdamW, init_args: {learning_rate: 1.0e-3}}
    schedule: {warmup_images: 240}
data:
  class_path: fmlit.Digits
  init_args: {batch_size: 12}
ema: {half_lives: [200]}
samples: {every: null}
checkpoint: {every: 60}
preemption: {check_every: 2}
trainer: {accelerator: cpu, log_every_n_steps: 1}
"""

multiprocessing.set_forkserver_preload(
    ["fmlit.cli.train", "diffusers.models.unets.unet_2d", "sklearn.datasets", "sklearn.model_selection", "torchvision"]
)
Fault = Callable[[int], None]


def _train(rank: int, folder: Path, args: Sequence[str], environment: dict[str, str], fault: Fault | None) -> None:
    """What a process does; its output goes to files."""
    os.setpgid(0, 0)
    for stream, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
        os.close(file)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if fault is not None:
        fault(rank)
    train.train(args, default_config=folder / "recipe.yaml")


class Job:
    """The ranks of one launch of ``train.py --resume auto``: the command that is given again after every end.

    Args:
        folder: holds recipe.yaml and runs/.
        args: more options.
        ranks: number of processes.
        environment: variables to set.
        fault: called in each process, with its rank, before it trains.
    """

    def __init__(
        self, folder: Path, *args: str, ranks: int = 1, environment: dict[str, str] | None = None, fault: Any = None
    ) -> None:
        self.folder, self.ranks = folder, ranks
        recipe = folder / "recipe.yaml"
        if not recipe.exists():
            recipe.write_text(RECIPE)
        args = ("--runs", str(folder / "runs"), "--name", "job", "--resume", "auto", *args)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        self.processes = []
        for rank in range(ranks):
            local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
            torchrun = {key: str(value) for key, value in {**local, **meeting}.items()} if ranks > 1 else {}
            own = {**torchrun, **(environment or {})}
            process = context.Process(target=_train, args=(rank, folder, args, own, fault))
            process.start()
            self.processes.append(process)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "job"

    @property
    def checkpoints(self) -> list[int]:
        """Images seen of the checkpoints that are there."""
        return sorted(int(path.stem) for path in (self.run / "checkpoints").glob("[0-9]*.ckpt"))

    @property
    def rows(self) -> int:
        """Lines in metrics.csv, one for each step."""
        try:
            return len((self.run / "metrics.csv").read_text().splitlines())
        except OSError:
            return 0

    def wait_until(self, condition: Callable[["Job"], Any]) -> None:
        until = time.monotonic() + 300
        while not condition(self):
            assert all(process.is_alive() for process in self.processes), self.outcomes()
            assert time.monotonic() < until
            time.sleep(0.01)

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(self.ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def outcomes(self, timeout_s: float = 60) -> list[Outcome]:
        """How each rank ended and what it said. One that is still there after the time is killed: code -9."""
        until = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return [
            Outcome(process.exitcode, *((self.folder / f"{name}-{rank}").read_text() for name in ("out", "err")))
            for rank, process in enumerate(self.processes)
        ]

    def finish(self) -> dict[str, Any]:
        """Wait for a good end; the last checkpoint."""
        for outcome in self.outcomes(timeout_s=300):
            assert outcome.code == 0, outcome
        return self.last()

    def last(self) -> dict[str, Any]:
        return torch.load(self.run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_training(a: dict[str, Any], b: dict[str, Any]) -> None:
    """That two checkpoints hold the same weights, averages, optimizer and progress, in every bit."""
    assert a["images_seen"] == b["images_seen"]
    assert a["global_step"] == b["global_step"]
    assert same(a["state_dict"], b["state_dict"])
    for name, average in a["ema"].items():
        assert same(average, b["ema"][name])
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (a, b)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        assert same(state, states[1][key])
