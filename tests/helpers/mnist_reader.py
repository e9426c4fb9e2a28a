"""A small convolutional network that reads handwritten digits, to judge samples of a model trained on MNIST.

    fmlit sample --checkpoint runs/mnist_cpu --n 2000 --save-images digits.npz
    python -m tests.helpers.mnist_reader digits.npz

It trains for a minute or two. Then it prints what share of the 10,000 real test digits it reads right, and what share
of the samples it reads as the class that was asked for.
"""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fmlit import MNIST
from fmlit.core.tensors import from_uint8

EPOCHS, BATCH = 3, 128


class MNISTReader(nn.Sequential):
    """Two convolutions of 5x5 and a linear layer: (B, 1, 28, 28) in [-1, 1] to (B, 10) logits."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 24), (24, 48)):
            convolution = nn.Conv2d(inputs, outputs, 5, padding=2)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(48 * 7 * 7, 10))

    def fit(self, images: Tensor, labels: Tensor) -> None:
        """Train on images that are shifted by up to two pixels."""
        batches = list(_batches(len(images)))
        optimizer = torch.optim.AdamW(self.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=len(batches))
        self.train()
        for batch in batches:
            shifted = torch.roll(images[batch], torch.randint(-2, 3, (2,)).tolist(), (2, 3))
            optimizer.zero_grad()
            nn.functional.cross_entropy(self(shifted), labels[batch]).backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """(B,) int64: the digit that each image shows."""
        self.eval()
        return torch.cat([self(part).argmax(1) for part in images.split(500)])


def _batches(count: int) -> Iterator[Tensor]:
    for _ in range(EPOCHS):
        yield from torch.randperm(count).split(BATCH)[: count // BATCH]


def _real(split: str) -> tuple[Tensor, Tensor]:
    digits = MNIST().dataset(split)
    return from_uint8(digits.data), digits.labels


def main(file: str) -> None:
    torch.manual_seed(0)
    reader = MNISTReader()
    reader.fit(*_real("train"))
    samples = np.load(file)
    drawn = from_uint8(torch.from_numpy(samples["arr_0"]).reshape(-1, 1, 28, 28)), torch.from_numpy(samples["arr_1"])
    for name, (images, labels) in {"test digits": _real("test"), "samples": drawn}.items():
        print(f"{len(images)} {name}: {(reader.read(images) == labels).float().mean():.4f} read right")


if __name__ == "__main__":
    main(sys.argv[1])
