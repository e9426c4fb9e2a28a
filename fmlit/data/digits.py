"""Handwritten digits that ship inside scikit-learn: real images without a download."""

import torch

from fmlit.data.data_module import DataModule, Split
from fmlit.data.stores import InMemoryDataset


class Digits(DataModule):
    """8x8 gray handwritten digits of 43 people (Alpaydin & Kaynak 1998): 1,437 to train on and 360 held out.

    The split is fixed and has the same share of every class; the 17 gray levels are spread over 0 ... 255.

    Args:
        batch_size: Images per optimizer step, over all ranks and all accumulated batches.
        seed: Seed of the order in which training sees the images.
    """

    shape = (1, 8, 8)
    class_names = tuple("0123456789")

    def load(self, split: Split) -> InMemoryDataset:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(range(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
        rows = sorted(train if split == "train" else test)
        images = torch.from_numpy(digits.images[rows]).mul(255 / 16).round().to(torch.uint8)
        return InMemoryDataset(images[:, None], torch.from_numpy(digits.target[rows]).long())
