"""Do generated images show the class that was asked for? A classifier of small images answers."""

import numpy as np
import torch
from torch import Tensor

from fmlit.core.errors import UserError
from fmlit.core.tensors import from_uint8

HELD_OUT = 0.2  # share of each class


class ClassReader:
    """A support vector machine that reads the class of an image, for small sets (8x8 digits: 0.98 held out).

    Fitted on pixels of part of the real images; the rest, held out, tells how far its reading can be trusted. Training
    takes a time quadratic in the number of images: minutes beyond 20,000.

    Args:
        images: real uint8 images (N, C, H, W).
        labels: (N,) class ids.

    Attributes:
        accuracy: share of the held-out real images read right.

    Raises:
        UserError: shapes that do not fit, or too few images or classes.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        from sklearn.model_selection import train_test_split
        from sklearn.svm import SVC

        if tuple(labels.shape) != (len(images),):
            raise UserError(f"labels must have shape ({len(images)},), one per image, got {tuple(labels.shape)}")
        pixels, classes = self._pixels(images), labels.cpu().numpy()
        self.image_shape = tuple(images.shape[1:])
        parts = train_test_split(pixels, classes, test_size=HELD_OUT, random_state=0, stratify=classes)
        fit_x, test_x, fit_y, test_y = parts
        self._machine = SVC(C=10.0).fit(fit_x, fit_y)  # C of 10 reads digits half a percent better than 1
        self.accuracy = float(self._machine.score(test_x, test_y))

    def read(self, images: Tensor) -> Tensor:
        """(B,) int64: the class that each uint8 image (B, C, H, W) is read as."""
        if tuple(images.shape[1:]) != self.image_shape:
            raise UserError(f"images of shape {tuple(images.shape[1:])}; this reader knows {self.image_shape}")
        return torch.from_numpy(self._machine.predict(self._pixels(images)))

    @staticmethod
    def _pixels(images: Tensor) -> np.ndarray:
        return from_uint8(images).flatten(1).cpu().numpy()
