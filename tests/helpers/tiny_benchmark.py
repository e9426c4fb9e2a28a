"""A recipe small enough to be benchmarked in a test."""

from pathlib import Path

from benchmarks.workload import Setup

RECIPE = """
images: 64
model:
  class_path: fmlit.FlowMatchingModule
  init_args:
    net:
      class_path: fmlit.UNet
      init_args: {channels: 32, multipliers: [1, 2], blocks: 1, attention: [4], head_channels: 32, dropout: 0.0}
    conditional: true
data: {class_path: fmlit.Digits, init_args: {batch_size: 4}}
ema: {half_lives: [100, 200]}
trainer: {gradient_clip_val: 1.0}
"""


def setup(folder: Path, old: str = "", new: str = "", **settings) -> Setup:
    """The recipe as a file, with one passage replaced, on the CPU."""
    assert old in RECIPE
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace(old, new) if old else RECIPE)
    return Setup(path, "cpu", **settings)
