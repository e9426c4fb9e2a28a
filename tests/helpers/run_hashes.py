"""Hash what training, sampling and scoring compute, to show that a refactoring changed none of it.

Run it before and after, on the same machine, and compare the two files::

    python tests/helpers/run_hashes.py --out before.json
    ...
    python tests/helpers/run_hashes.py --out after.json && cmp before.json after.json

It trains the quickstart, a score-matching model, a run on two processes, and a run that is interrupted and resumed. For
each it hashes the raw weights, the averages and the optimizer's state. It also hashes the tensors that ``sample.py``
draws and records the scores that ``evaluate.py`` finds. It uses the command line only. Takes about four minutes on two
cores.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
SHORT = ["--images", "6400", "--samples.every", "null", "--quality.every", "null"]
SCORE_MATCHING = """
images: 6400
model:
  class_path: ScoreMatchingModule
  init_args:
    net:
      class_path: UNet
      init_args: {channels: 16, multipliers: [1, 2], blocks: 1, attention: [4], head_channels: 16}
    conditional: true
data:
  class_path: Digits
ema: {half_lives: [1000, 5000]}
samples: {every: null}
trainer: {gradient_clip_val: 1.0}
"""


def run(script: str, *args: str) -> dict[str, Any]:
    """The last line of a script's output, which is JSON."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / script), *args]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}\n{ended.stdout}\n{ended.stderr}")
    return json.loads(ended.stdout.splitlines()[-1])


def digest(tensors: list[torch.Tensor]) -> str:
    """SHA-256 of the values, in order."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of a nested state, by sorted keys."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for key in sorted(value, key=str) for tensor in tensors_in(value[key])]
    return []


def hashes(folder: Path) -> dict[str, str]:
    """Hashes of the newest checkpoint of a run."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    weights = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("model.net.")}
    states = [state["state"] for state in checkpoint["optimizer_states"]]
    return {
        "raw": digest(tensors_in(weights)),
        **{f"average {name}": digest(tensors_in(state)) for name, state in checkpoint["ema"].items()},
        "optimizer": digest([tensor for state in states for tensor in tensors_in(state)]),
    }


def sampled(folder: Path, *args: str) -> str:
    """Hash of the images that ``sample.py`` draws."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "samples.npz")
        options = ["--n", "40", "--save_images", str(file), "--out", str(Path(name, "samples.png"))]
        run("sample.py", "--checkpoint", str(folder), *options, *args)
        return hashlib.sha256(np.load(file)["arr_0"].tobytes()).hexdigest()


def scored(folder: Path, *args: str) -> dict[str, Any]:
    """Scores of a run, and the digest of the images behind them."""
    names = ["fid", "kid", "precision", "recall", "class"]
    result = run(
        "evaluate.py", "--checkpoint", str(folder), "--n", "500", "--metrics", ",".join(names), *args, "--out",
        str(folder / "scores"), "--cache", str(folder / "statistics"),
    )  # fmt: skip
    return {cell["name"]: {"scores": cell["scores"], "protocol": cell["protocol"]} for cell in result["cells"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the hashes.")
    out = parser.parse_args().out
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        runs = ["--runs", name, "--trainer.enable_progress_bar", "false"]
        quickstart = Path(run("train.py", *runs)["run"])
        found["quickstart"] = hashes(quickstart)
        for solver in ("heun", "unipc", "ipndm", "euler_maruyama", "churn"):
            found[f"quickstart samples {solver}"] = sampled(quickstart, "--solver", solver, "--steps", "8")
        found["quickstart samples guided"] = sampled(quickstart, "--guidance", "2.0", "--labels", "3,7")
        found["quickstart scores"] = scored(quickstart, "--solver", "midpoint,dpmpp_3m", "--steps", "4")
        recipe = Path(name, "score.yaml")
        recipe.write_text(SCORE_MATCHING)
        score_matching = Path(run("train.py", "--config", str(recipe), *runs)["run"])
        found["score matching"] = hashes(score_matching)
        found["score matching samples"] = sampled(score_matching, "--solver", "stochastic_heun", "--steps", "12")
        found["score matching scores"] = scored(score_matching, "--solver", "heun", "--steps", "6")
        two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
        found["two processes"] = hashes(Path(run("train.py", *runs, "--name", "two", *SHORT, *two)["run"]))
        found["uninterrupted"] = hashes(Path(run("train.py", *runs, "--name", "whole", *SHORT)["run"]))
        run("train.py", *runs, "--name", "halves", *SHORT, "--trainer.max_steps", "23")
        found["interrupted and resumed"] = hashes(
            Path(run("train.py", *runs, "--name", "halves", *SHORT, "--resume")["run"])
        )
    if found["uninterrupted"] != found["interrupted and resumed"]:
        print("warning: the resumed run differs from the uninterrupted one", file=sys.stderr)
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
