"""Samples as pictures: grids of images, and plots of vectors."""

import io
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmlit.core.tensors import to_uint8

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = 48  # pixels: the least width at which a picture in a grid is easy to read


def draw_samples(samples: Tensor, columns: int) -> "Image":
    """A picture of samples (B, *shape): a grid of images in [-1, 1], a histogram of scalars, a scatter of vectors."""
    return image_grid(to_uint8(samples), columns) if samples.ndim == 4 else vector_plot(samples.flatten(1))


def image_grid(images: Tensor, columns: int) -> "Image":
    """uint8 images (B, C, H, W), C = 1 or 3, row by row; small ones enlarged by a whole factor, without smoothing."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    factor = math.ceil(CELL / images.shape[-1])
    enlarged = images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    return to_pil_image(make_grid(enlarged.cpu(), nrow=columns, padding=2, pad_value=255))


def vector_plot(points: Tensor) -> "Image":
    """Points (B, d) as a histogram (d = 1) or as a scatter plot of the first two coordinates."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(4, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    values = torch.nan_to_num(points).cpu().numpy()
    if values.shape[1] == 1:
        axes.hist(values[:, 0], bins=80, density=True)
    else:
        axes.scatter(values[:, 0], values[:, 1], s=2, alpha=0.5)
        axes.set_aspect("equal")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")
