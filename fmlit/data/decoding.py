"""Picture files of any origin to square uint8 RGB tensors; a broken file is named, and none can execute anything."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmlit.core.errors import FileError, UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow looks at the contents, not at the name: without this list, PostScript under a name ending in .png would be
# handed to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def find_pictures(folder: str | Path) -> list[str]:
    """Paths of all pictures below ``folder``, relative to it, with forward slashes, sorted; hidden ones left out.

    Raises:
        UserError: the folder is not there, or there is no picture in it.
    """
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}: give the folder that holds the pictures")
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        above = [os.path.realpath(p) for p in (Path(parent), *Path(parent).parents)]
        shown = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in shown if not _leads_back(Path(parent, name), above)]
        pictures = [name for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
        found += [Path(parent, name).relative_to(folder).as_posix() for name in pictures]
    if not found:
        raise UserError(f"there are no pictures in {folder}: fmlit reads {', '.join(EXTENSIONS)}")
    return sorted(found)


def _leads_back(folder: Path, above: list[str]) -> bool:
    """Whether a link leads to a folder above it, and would be walked through again and again."""
    return folder.is_symlink() and any(Path(place).is_relative_to(os.path.realpath(folder)) for place in above)


@contextmanager
def open_picture(path: str | Path) -> Iterator[Any]:
    """The Pillow image in a file. Whatever fails inside the block becomes a ``FileError`` that names the file."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except Exception as error:  # a decoder of arbitrary bytes may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileError(f"cannot read the picture {path} ({reason}): repair or remove it") from error


def read_picture(path: str | Path, size: int) -> Tensor:
    """One picture as uint8 (3, size, size): upright by its EXIF tag, on white where transparent, the central square.

    The shorter side becomes ``size`` by Lanczos resampling, which averages over all source pixels when it shrinks.

    Raises:
        FileError: the file is not a picture, is damaged, truncated or absurdly large.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with open_picture(path) as image:
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
