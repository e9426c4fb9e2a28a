"""How many drawn digits show the class that was asked for? A convolutional network that was trained on MNIST answers.

Run it from a clone, with MNIST in ``data``::

    python -m benchmarks.read_digits runs/mnist_cpu --n 2000 --steps 10

It prints one line of JSON: the share of generated digits read as their class, and the share of real test digits that
the same reader reads correctly. The reader is trained once, in five minutes on one core, and kept in ``weights``.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import fmlit
from fmlit.core.tensors import from_uint8, to_uint8

READER = Path("weights/digit_reader.pt")


def build() -> nn.Sequential:
    """A convolutional network of 0.2 M parameters: images (B, 1, 28, 28) in [-1, 1] to logits (B, 10)."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    features = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 64), nn.MaxPool2d(2), *block(64, 64)]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(0.3), nn.Linear(576, 10))


def train(images: Tensor, labels: Tensor, epochs: int = 4, batch: int = 128, seed: int = 0) -> nn.Sequential:
    """Train a reader on images (N, 1, 28, 28) in [-1, 1], moved by up to two pixels, and labels (N,)."""
    torch.manual_seed(seed)
    net = build().train()
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    padded = F.pad(images, (2, 2, 2, 2), value=-1.0)
    for step in trange(steps, desc="reader", mininterval=5):
        if step % (len(images) // batch) == 0:
            order = torch.randperm(len(images))
        picked = order[torch.arange(step * batch, (step + 1) * batch) % (len(images) // batch * batch)]
        top, left = torch.randint(5, (2,)).tolist()
        moved = padded[picked, :, top : top + 28, left : left + 28]
        loss = F.cross_entropy(net(moved), labels[picked], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def share_right(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images in [-1, 1] that the network reads as their label."""
    right = [
        (net(part).argmax(1) == asked).sum() for part, asked in zip(images.split(500), labels.split(500), strict=True)
    ]
    return float(sum(right)) / len(images)


def load_reader(data: fmlit.MNIST) -> nn.Sequential:
    """The kept reader, or a new one."""
    if READER.is_file():
        net = build()
        net.load_state_dict(torch.load(READER, weights_only=True))
        return net.eval()
    real = data.load("train")
    net = train(from_uint8(real.data), real.labels)
    READER.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), READER)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a run folder, a checkpoint or an export")
    parser.add_argument("--n", type=int, default=2_000, help="number of digits to draw, equally many of each class")
    parser.add_argument("--solver", default="midpoint")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--grid", default="UniformGrid", help="name of a grid in fmlit")
    parser.add_argument("--sigma", help="name of a diffusion in fmlit, for the SDE solvers")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = fmlit.MNIST(download=False)
    net, test = load_reader(data), data.load("test")
    labels = torch.arange(options.n) % 10
    images = fmlit.sample(
        fmlit.load(options.checkpoint),
        n=options.n,
        labels=labels,
        solver=options.solver,
        steps=options.steps,
        guidance=options.guidance,
        grid=getattr(fmlit, options.grid)(),
        sigma=getattr(fmlit, options.sigma)() if options.sigma else None,
        seed=options.seed,
    )
    images = from_uint8(to_uint8(images))
    result = {
        "read_right": share_right(net, images, labels),
        "real_read_right": share_right(net, from_uint8(test.data), test.labels),
        "n": options.n,
        "sampler": f"{options.solver}, {options.steps} steps, {options.grid}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
