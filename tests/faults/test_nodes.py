"""Two nodes, as network namespaces: torchrun over gloo loses one of them, goes on, and takes it back."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.faults.jobs import RECIPE, Job

ROOT = Path(__file__).parents[2]
NAMES = (f"fmlit{os.getpid()}a", f"fmlit{os.getpid()}b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[None]:
    """Two namespaces with a cable between them."""
    if not shutil.which("ip"):
        pytest.skip("there is no ip on the PATH (Debian's iproute2)")
    try:
        ip("netns", "add", NAMES[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this user may not make network namespaces ({error.stderr.strip()})")
    try:
        ip("netns", "add", NAMES[1])
        ip("-n", NAMES[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


class Node:
    """torchrun on one of the nodes, with one process."""

    def __init__(self, folder: Path, number: int, *args: str) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=test"]
        # A namespace cannot tell by its host name that the endpoint is its own.
        settings = f"is_host={int(number == 0)},last_call_timeout=10,join_timeout=120"
        patience = [f"--rdzv-conf={settings}", "--max-restarts=9", "--monitor-interval=0.5"]
        script = [str(ROOT / "scripts" / "train.py"), "--config", str(folder / "recipe.yaml"), "--resume", "auto"]
        command = [*torchrun, *rendezvous, *patience, f"--local-addr={ADDRESSES[number]}", *script, *args]
        # torchrun's store, once shared with the workers, is not announced to a node that comes later.
        elastic = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment = {**os.environ, **elastic, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
        self.log = folder / f"node-{number}"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", NAMES[number], *command, "--runs", str(folder / "runs")],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def lose_power(self) -> None:
        """kill -9 to torchrun and to what it has started, which may be in sessions of its own."""
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        ).stdout.split()
        for pid in (self.process.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> str:
        try:
            code = self.process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            self.lose_power()
            pytest.fail(self.log.read_text())
        assert code == 0, self.log.read_text()
        return self.log.read_text()


def test_torchrun_goes_on_without_a_node_and_with_it_again(nodes, tmp_path):
    options = ("--model.net.dropout", "0", "--images", "7200")
    (tmp_path / "whole").mkdir()
    expected = Job(tmp_path / "whole", *options).finish()

    (tmp_path / "recipe.yaml").write_text(RECIPE)
    checkpoints = tmp_path / "runs" / "recipe" / "checkpoints"

    def wait_for(images: int) -> int:
        until = time.monotonic() + 300
        while True:
            seen = max((int(path.stem) for path in checkpoints.glob("[0-9]*.ckpt")), default=0)
            if seen >= images:
                return seen
            assert time.monotonic() < until, (first.log.read_text(), second.log.read_text())
            time.sleep(0.1)

    first, second = Node(tmp_path, 0, *options), Node(tmp_path, 1, *options)
    try:
        both = wait_for(600)
        second.lose_power()
        alone = wait_for(both + 1200)
        second = Node(tmp_path, 1, *options)
        said = first.finish() + second.finish()
    finally:
        first.lose_power()
        second.lose_power()
    assert alone < 6000, "it ended before the node came back"
    summary = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith('{"run"')))
    assert summary["images_seen"] == 7200
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["recipe"]
    assert said.count("resumed after") >= 2  # alone, and together again
    rows = (tmp_path / "runs" / "recipe" / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [str(step) for step in range(1, 601)]
    last = torch.load(checkpoints / "last.ckpt", weights_only=True)
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(last["state_dict"][name], value, rtol=0, atol=2e-3)
