"""The training command as processes: killed, interrupted, launched twice, and failing together."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fmlit.training.trainer_settings import check_launch
from tests.helpers.tiny_cli import CONFIGS, Outcome, metrics_of, recipe, runs_in, train

SCRIPT = CONFIGS.parent / "scripts" / "train.py"


def test_processes_that_would_each_train_alone_in_the_same_folder_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launch(world_size=4)  # Lightning starts them
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(world_size=2)
    with pytest.raises(ValueError, match=r"^trainer.devices: 2 processes were started, but 1 would train together"):
        check_launch(world_size=1)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_JOB_NAME", "training")
    check_launch(world_size=8)
    with pytest.raises(ValueError, match=r"^trainer.devices: 8 processes"):
        check_launch(world_size=4)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    check_launch(world_size=4)  # in a batch job without srun, Lightning starts them again


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), "--runs", str(folder / "runs"), "--config", str(recipe(folder)), *args]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_listen_to_ctrl_c
    )


def _listen_to_ctrl_c() -> None:
    """What a shell starts in the background ignores it, and so would all that these tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    last = folder / "runs" / "tiny" / "checkpoints" / "last.ckpt"
    until = time.monotonic() + 200
    while not last.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert last.exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_without_a_gap_and_without_a_step_twice(tmp_path: Path) -> None:
    process = start(tmp_path, "--images=100_000_000", "--checkpoint.every=1600")
    wait_for_checkpoint(tmp_path, process)
    time.sleep(0.5)
    process.kill()
    process.communicate()
    run = tmp_path / "runs" / "tiny"
    with (run / "metrics.csv").open("a") as file:
        file.write("123456,99")  # half a line, as of a machine that lost its power

    images = int(metrics_of(run)[-2]["images_seen"]) + 800
    outcome = train(tmp_path, "--resume", f"--images={images}")
    assert outcome.summary["images_seen"] == images
    rows = metrics_of(run)
    assert [int(row["step"]) for row in rows] == list(range(5, images // 16 + 1, 5))
    assert [int(row["images_seen"]) for row in rows] == list(range(80, images + 1, 80))


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = start(tmp_path, "--images=100_000_000")
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    answer, ending = err.splitlines()
    assert answer == "SIGINT: saving a checkpoint before the run ends; a second signal ends it at once"
    assert re.fullmatch(r"interrupted by SIGINT: saved .*/checkpoints/\d+\.ckpt; --resume goes on", ending)


def launch(folder: Path, *args: str) -> Outcome:
    process = start(folder, "--trainer.devices=2", "--trainer.strategy=ddp", *args)
    out, err = process.communicate(timeout=300)
    return Outcome(process.returncode, out, err)


@pytest.mark.slow
def test_two_processes_share_a_run_its_resume_and_its_errors(tmp_path: Path) -> None:
    first = launch(tmp_path)
    assert first.err == ""
    assert first.summary["images_seen"] == 320
    again = launch(tmp_path, "--resume", "--images=640")
    assert again.summary["images_seen"] == 640
    assert [row["step"] for row in metrics_of(tmp_path / "runs" / "tiny")] == [str(step) for step in range(5, 45, 5)]
    missing = launch(tmp_path, "--data=MNIST", f"--data.root={_truncated_mnist(tmp_path)}", "--data.download=false")
    assert "is truncated or damaged" in missing.error
    assert runs_in(tmp_path) == ["tiny"]


@pytest.mark.slow
def test_one_process_and_two_leave_out_the_same_broken_pictures(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(12):
        Image.effect_noise((16, 16), 20 + 5 * number).save(pictures / f"{number}.png")
    data = (f"--data.root={pictures}", "--data.size=8", "--data.num_workers=0", "--data.batch_size=4")
    data = ("--data=ImageFolder", *data, "--images=40", "--trainer.log_every_n_steps=1", "--data.check=skip")
    broken = [pictures / "3.png", pictures / "5.png"]
    contents = [path.read_bytes()[:100] for path in broken]
    for path in broken:
        path.unlink()
    assert train(tmp_path, "--name=whole", *data).code == 0
    for path, content in zip(broken, contents, strict=True):
        path.write_bytes(content)
    assert train(tmp_path, "--name=one", *data).code == 0
    two = launch(tmp_path, "--name=two", *data)
    assert two.code == 0, two
    assert two.err == f"{pictures}: left out 2 of 12 pictures, which cannot be read: 3.png, 5.png\n"
    losses = [[float(row["loss"]) for row in metrics_of(tmp_path / "runs" / name)] for name in ("whole", "one", "two")]
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_a_mistake_that_only_one_process_meets_is_heard_and_ends_both(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        Image.effect_noise((16, 16), 50).save(tmp_path / "pictures" / f"{number}.png")
    broken = tmp_path / "pictures" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    data = ("--data=ImageFolder", f"--data.root={broken.parent}", "--data.size=8", "--data.num_workers=0")
    outcome = launch(tmp_path, *data, "--data.batch_size=4")
    assert outcome.code in (1, 2)  # as rank 0 has met the picture or lost the other
    lines = outcome.err.splitlines()
    assert sum(f"cannot read the picture {broken}" in line for line in lines) == 1
    assert all(re.match(r"error: (rank 1: )?(cannot read|lost another process)", line) for line in lines)


def _truncated_mnist(folder: Path) -> Path:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(bytes(100))
    return folder
