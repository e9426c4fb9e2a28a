"""Pictures of samples."""

import pytest
import torch

from fmlit.sampling.drawing import CELL, image_grid


@pytest.mark.parametrize(("size", "cell"), [(8, 48), (28, 56), (32, 64), (48, 48), (64, 64), (7, 49)])
def test_small_images_are_enlarged_to_what_is_easy_to_read(size, cell):
    picture = image_grid(torch.zeros(6, 1, size, size, dtype=torch.uint8), columns=3)
    assert cell >= CELL
    assert picture.size == (3 * (cell + 2) + 2, 2 * (cell + 2) + 2)
