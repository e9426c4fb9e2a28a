"""Sets of images on the disk, in the two forms that other tools read: a folder of PNGs, and ADM's ``.npz``.

An ``.npz`` holds ``arr_0``, uint8 (N, H, W, C), and ``arr_1``, int64 class ids (N,), where there are classes
(Dhariwal & Nichol 2021).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.data.decoding import find_pictures, open_picture
from fmlit.data.image_folder import PictureFolder
from fmlit.data.stores import InMemoryDataset, LabeledDataset


def save_pngs(folder: Path, images: Tensor, first: int = 0) -> None:
    """uint8 images (B, C, H, W), C = 1 or 3, as ``000000.png``, ``000001.png``, ... from number ``first`` on."""
    from torchvision.transforms.functional import to_pil_image

    for number, image in enumerate(images.cpu(), start=first):
        to_pil_image(image).save(folder / f"{number:06d}.png")


def save_npz(file: IO[bytes], samples: Tensor, labels: Tensor | None = None) -> None:
    """uint8 images (B, C, H, W), channels last, or vectors (B, *shape) as they are; labels (B,)."""
    channels_last = samples.permute(0, 2, 3, 1) if samples.ndim == 4 else samples
    arrays: dict[str, Any] = {"arr_0": channels_last.cpu().numpy()}
    if labels is not None:
        arrays["arr_1"] = labels.cpu().numpy()
    np.savez(file, **arrays)


def read_images(path: str, shape: Sequence[int] | None) -> LabeledDataset:
    """The images of a folder (at any depth) or an ``.npz``, none of them resized.

    Args:
        path: the folder or file.
        shape: (C, H, W) that they must have. Where C = 1, color files whose channels agree count as gray. None takes
            that of the first picture; files are in color then.

    Raises:
        UserError: another size or type, colors where gray is wanted, a broken file: the file is named.
    """
    if Path(path).suffix == ".npz":
        return _read_npz(path, shape)
    names = find_pictures(path)
    if shape is None:
        with open_picture(Path(path, names[0])) as picture:
            shape = 3, picture.height, picture.width
    _check_sizes(path, names, tuple(shape))
    pictures = PictureFolder if shape[0] == 3 else _GrayPictures
    return pictures(path, names, [0] * len(names), size=shape[1])


class _GrayPictures(PictureFolder):
    """Gray pictures, which are read as RGB, as one channel."""

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rgb, labels = super().batch(indices)
        colored = (rgb != rgb[:, :1]).flatten(1).any(dim=1)
        if colored.any():
            name = self.names[indices[int(colored.nonzero()[0])]]
            raise UserError(f"{Path(self.root, name)} is in color, and the data are gray images")
        return rgb[:, :1], labels


def _check_sizes(root: str, names: Sequence[str], shape: tuple[int, ...]) -> None:
    """Reading would resize and crop: an FID of resized images is another number."""
    if shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise UserError(f"images of shape {shape} are read from an .npz, not from a folder of pictures")
    for name in names:
        path = Path(root, name)
        with open_picture(path) as picture:
            width, height = picture.size
        if (height, width) != shape[1:]:
            raise UserError(
                f"{path} is {width}x{height} pixels, and the data {shape[2]}x{shape[1]}: images are scored as they are"
            )


def _read_npz(path: str, shape: Sequence[int] | None) -> LabeledDataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["arr_0"]
    except OSError:
        raise
    except Exception as error:  # zipfile and numpy have a dozen ways to say that a file is damaged
        raise UserError(f"{path} is not an .npz file with images in arr_0 ({error})") from error
    expected = "N, H, W, C" if shape is None else f"N, {', '.join(map(str, (*shape[1:], shape[0])))}"
    fits = images.ndim == 4 if shape is None else images.shape[1:] == (*shape[1:], shape[0])
    if images.dtype != np.uint8 or not fits:
        like = "" if shape is None else " like the data"
        raise UserError(f"arr_0 of {path} must be uint8 ({expected}){like}, got {images.dtype} {images.shape}")
    return InMemoryDataset(torch.from_numpy(images).permute(0, 3, 1, 2))
