"""Picture files of any origin to square uint8 RGB tensors; a broken file is named, and none can execute anything."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmlit.core.errors import FileError, UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow looks at the contents, not at the name: without this list, PostScript under a name ending in .png would be
# handed to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_MEGAPIXELS = 100.0  # 0.3 GB once decoded. A file of half a megabyte can hold more, and takes half a minute


def find_pictures(folder: str | Path) -> list[str]:
    """Paths of all pictures below ``folder``, relative to it, with forward slashes, sorted; hidden ones left out.

    Raises:
        UserError: the folder is not there, or there is no picture in it.
    """
    return list_files(folder)[0]


def list_files(folder: str | Path) -> tuple[list[str], Counter[str]]:
    """``find_pictures``, and how many other files there are of each ending. Each real folder counts once.

    Links are followed after all else, so that a link to a folder that lies here as well does not take its place.
    """
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}: give the folder that holds the pictures")
    found, others, seen = [], Counter[str](), set()
    folders, links = [(str(folder), "")], list[tuple[str, str]]()
    while folders or links:
        place, name = (folders or links).pop()
        if (real := os.path.realpath(place)) in seen:
            continue
        seen.add(real)
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = f"{name}{entry.name}"
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append((entry.path, f"{path}/"))
                elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():  # no pipe, no device
                    found.append(path)
                else:
                    others[Path(path).suffix.lower() or "without an ending"] += 1
    if not found:
        raise UserError(f"there are no pictures in {folder}: fmlit reads {', '.join(EXTENSIONS)}")
    return sorted(found), others


@contextmanager
def open_picture(path: str | Path, max_megapixels: float = MAX_MEGAPIXELS) -> Iterator[Any]:
    """The Pillow image in a file. Whatever fails inside the block becomes a ``FileError`` that names the file."""
    from PIL import Image

    pillows, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours takes its place
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > 1e6 * max_megapixels:
                raise UserError(f"{image.width}x{image.height} pixels, and the limit is {max_megapixels:g} megapixels")
            yield image
    except Exception as error:  # a decoder of arbitrary bytes may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileError(f"cannot read the picture {path} ({reason}): repair or remove it") from error
    finally:
        Image.MAX_IMAGE_PIXELS = pillows


def read_picture(path: str | Path, size: int, max_megapixels: float = MAX_MEGAPIXELS) -> Tensor:
    """One picture as uint8 (3, size, size): upright by its EXIF tag, on white where transparent, the central square.

    The shorter side becomes ``size`` by Lanczos resampling, which averages over all source pixels when it shrinks.

    Raises:
        FileError: the file is not a picture, is damaged or truncated, or has more pixels than allowed.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with open_picture(path, max_megapixels) as image:
        square = ImageOps.fit(_to_rgb(ImageOps.exif_transpose(image)), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _to_rgb(image):
    """8-bit RGB of a Pillow image of any mode."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion clips at 255
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise UserError(f"32-bit levels from {levels.min()} to {levels.max()} have no fixed white")
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise UserError("floating-point levels have no fixed white")
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors)
    return image.convert("RGB")
