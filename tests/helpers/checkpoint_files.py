"""Small checkpoint files, and ways to damage them, that several test files share."""

import torch

from fmlit.storage.checkpoints import AtomicCheckpointIO


def checkpoint(step, size=40):
    values = torch.arange(size, dtype=torch.float32) + step
    return {"global_step": step, "images_seen": 128 * step, "state_dict": {"w": values}, "callbacks": {"a": [1, None]}}


def save(path, step=1, **options):
    AtomicCheckpointIO().save_checkpoint(checkpoint(step, **options), path)
    return path


def flip(path, position=None):
    """Flip one bit, by default of the tensor's data, so that the file still loads."""
    data = bytearray(path.read_bytes())
    if position is None:
        position = data.index(torch.tensor([7.0, 8.0, 9.0]).numpy().tobytes())
    data[position] ^= 1
    path.write_bytes(data)


def names(folder):
    return sorted(path.name for path in folder.iterdir())
