"""Reference statistics: right, cached under what they depend on, and whole whatever happens around them."""

import dataclasses
import os
import threading
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from fmlit.metrics import NetworkFeatures, PixelFeatures, Reference, reference_statistics
from fmlit.metrics.reference import KEPT


class Pictures(Dataset):
    """n random labelled pictures, which count how often they are read."""

    def __init__(self, n: int, shape=(1, 4, 4), seed: int = 0) -> None:
        self.images = torch.randint(
            0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        self.reads = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        self.reads += 1
        return self.images[index], index % 10


def compute(pictures, cache, features=None, **options) -> Reference:
    arguments = {"fingerprint": "abc", "split": "train", "batch_size": 7, **options}
    with mock.patch("fmlit.metrics.reference.KEPT", arguments.pop("kept", KEPT)):
        return reference_statistics(pictures, features=features or PixelFeatures(), cache_dir=cache, **arguments)


def test_statistics_are_those_of_all_images(tmp_path):
    pictures = Pictures(50)
    reference = compute(pictures, tmp_path)
    pixels = PixelFeatures()(pictures.images).double()
    assert reference.count == 50
    assert reference.image_shape == (1, 4, 4)
    torch.testing.assert_close(reference.mean, pixels.mean(dim=0))
    torch.testing.assert_close(reference.covariance, torch.cov(pixels.T))
    assert reference.indices.sort().values.tolist() == list(range(50))
    assert reference.indices.tolist() != list(range(50))  # random order: any first part is a random subset
    assert torch.equal(reference.features.double(), pixels[reference.indices])


def test_a_stated_number_of_features_is_kept(tmp_path):
    pictures = Pictures(50)
    reference = compute(pictures, tmp_path, kept=11)
    assert len(reference.indices.unique()) == len(reference.features) == 11
    assert torch.equal(reference.features, PixelFeatures()(pictures.images[reference.indices]))
    assert reference.count == 50


def test_flips_add_the_mirror_images(tmp_path):
    pictures = Pictures(20)
    reference = compute(pictures, tmp_path, flip=True)
    both = torch.cat([pictures.images, pictures.images.flip(-1)])
    assert reference.count == 40
    torch.testing.assert_close(reference.covariance, torch.cov(PixelFeatures()(both).double().T))
    assert torch.equal(reference.features, PixelFeatures()(both[reference.indices]))


def test_the_second_call_reads_the_cache_even_where_it_cannot_write(tmp_path, monkeypatch):
    pictures = Pictures(30)
    first = compute(pictures, tmp_path)
    pictures.reads = 0
    monkeypatch.setattr(os, "replace", None)
    second = compute(pictures, tmp_path)
    assert pictures.reads == 1  # the first image, for its shape
    for field in dataclasses.fields(Reference):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert len(list(tmp_path.iterdir())) == 1


def test_pytorch_fids_names_are_in_the_file(tmp_path):
    reference = compute(Pictures(30), tmp_path)
    with np.load(next(tmp_path.iterdir())) as file:
        np.testing.assert_array_equal(file["mu"], reference.mean)
        np.testing.assert_array_equal(file["sigma"], reference.covariance)


def test_the_cache_is_keyed_by_all_that_matters(tmp_path):
    torch.manual_seed(0)
    networks = [NetworkFeatures(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)), "net") for _ in "ab"]
    variants = [
        {},
        {"fingerprint": "abd"},
        {"split": "test"},
        {"flip": True},
        {"kept": 3},
        {"features": networks[0]},
        {"features": networks[1]},
    ]
    for variant in variants:
        compute(Pictures(30), tmp_path, **variant)
    compute(Pictures(29), tmp_path)
    assert len(list(tmp_path.iterdir())) == len(variants) + 1
    compute(Pictures(30), tmp_path, batch_size=9)  # changes nothing but rounding
    assert len(list(tmp_path.iterdir())) == len(variants) + 1


def test_statistics_of_something_else_under_this_name_are_refused(tmp_path):
    compute(Pictures(30), tmp_path)
    (right,) = tmp_path.iterdir()
    compute(Pictures(30), tmp_path, split="test")
    (wrong,) = set(tmp_path.iterdir()) - {right}
    wrong.replace(right)
    with pytest.raises(ValueError, match=r"pixels-train-.*\.npz holds statistics of .*split='test'.* delete it"):
        compute(Pictures(30), tmp_path)


def test_a_damaged_cache_is_named_and_computed_again(tmp_path):
    good = compute(Pictures(30), tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no archive at all", whole[:900] + b"\x55" + whole[901:]):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"pixels-train-.*\.npz does not hold reference statistics.*again"):
            again = compute(Pictures(30), tmp_path)
        assert torch.equal(again.covariance, good.covariance)
        assert torch.equal(Reference.load(path).covariance, good.covariance)


def test_no_flipped_bit_passes(tmp_path):
    good = compute(Pictures(5, shape=(1, 2, 2)), tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            read = Reference.load(path)
        except ValueError:
            refused += 1
        else:  # padding and time stamps of the archive
            assert read.identity == good.identity
            assert torch.equal(read.mean, good.mean)
            assert torch.equal(read.covariance, good.covariance)
            assert torch.equal(read.features, good.features)
    assert refused > 0.3 * len(whole) / 13


def test_a_failed_write_leaves_nothing_behind_but_a_warning(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match=r"not cached, .*\.npz cannot be written: .*No space left"):
        reference = compute(Pictures(30), tmp_path)
    assert reference.count == 30
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be written"):
        compute(Pictures(30), tmp_path / "file" / "cache")


def test_readers_and_writers_at_once_always_see_a_whole_file(tmp_path):
    reference = compute(Pictures(30), tmp_path)
    (path,) = tmp_path.iterdir()
    stop, failures = threading.Event(), []

    def write() -> None:
        while not stop.is_set():
            try:
                reference.save(path)
            except Exception as error:
                failures.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(50):
            assert torch.equal(Reference.load(path).features, reference.features)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert failures == []
    assert list(tmp_path.iterdir()) == [path]


def test_bad_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="the train split holds 0 images"):
        compute(Pictures(0), tmp_path)
    with pytest.raises(ValueError, match="the train split holds 1 images"):
        compute(Pictures(1), tmp_path)
    with pytest.raises(ValueError, match="fingerprint"):
        compute(Pictures(9), tmp_path, fingerprint="")
    mixed = Pictures(9)
    mixed.images = [*mixed.images[:8], torch.zeros(1, 5, 5, dtype=torch.uint8)]
    with pytest.raises(
        ValueError, match=r"image 8 of the train split is torch.uint8 \(1, 5, 5\).*first is \(1, 4, 4\)"
    ):
        compute(mixed, tmp_path)
    floats = Pictures(9)
    floats.images = floats.images.float()
    with pytest.raises(ValueError, match=r"image 0 of the train split is torch.float32"):
        compute(floats, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_drawn_from_the_global_generator(tmp_path):
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute(Pictures(30), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
