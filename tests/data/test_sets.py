"""Facts of all data sets; the digits, the toys and the fingerprints."""

import subprocess
import sys

import pytest
import torch

from fmlit import CIFAR10, MNIST, Checkerboard, DataModule, Digits, Moons, TwoPoints
from fmlit.data.stores import InMemoryDataset, warn_of_uneven_classes


def everything(data, split="train"):
    """(data, labels) of a whole split."""
    items = data.dataset(split)
    return items.batch(range(len(items)))


def test_importing_the_package_imports_no_data_library():
    program = (
        "import sys, lightning.pytorch; before = set(sys.modules)\n"
        "from fmlit import CIFAR10, MNIST, Checkerboard, Digits, ImageFolder, Moons, TwoPoints\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) <= {"fmlit", *sys.stdlib_module_names}


def test_arguments_are_kept_and_facts_are_known_before_any_file_is_read(tmp_path):
    facts = {
        Digits: ((1, 8, 8), 10),
        MNIST: ((1, 28, 28), 10),
        CIFAR10: ((3, 32, 32), 10),
        TwoPoints: ((1,), None),
        Moons: ((2,), None),
        Checkerboard: ((2,), None),
    }
    for kind, (shape, classes) in facts.items():
        data = kind(batch_size=6, seed=3)
        assert isinstance(data, DataModule)
        assert (data.shape, data.num_classes, data.batch_size, data.seed) == (shape, classes, 6, 3)
        assert (data.class_names is None) == (classes is None)


def test_digits_split_is_fixed_stratified_and_disjoint():
    (train, train_labels), (test, test_labels) = everything(Digits()), everything(Digits(seed=5), "test")
    assert (train.shape, test.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert train.dtype == torch.uint8
    assert set(train.unique().tolist()) == {round(level * 255 / 16) for level in range(17)}
    shares = test_labels.bincount() / (test_labels.bincount() + train_labels.bincount())
    assert (shares - 0.2).abs().max() < 0.005
    assert not {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in test}
    image, label = Digits().dataset("train")[7]
    assert torch.equal(image, train[7])
    assert (type(label), label) == (int, train_labels[7])
    assert Digits().fingerprint("train") == Digits(seed=5).fingerprint("train") != Digits().fingerprint("test")


def test_a_reader_trained_on_the_train_digits_reads_the_test_digits():
    from sklearn.svm import SVC

    (train, train_labels), (test, test_labels) = everything(Digits()), everything(Digits(), "test")
    reader = SVC(gamma=0.001 * (16 / 255) ** 2).fit(train.flatten(1).numpy(), train_labels.numpy())
    assert reader.score(test.flatten(1).numpy(), test_labels.numpy()) > 0.98


def test_two_points_are_two_diracs_of_equal_weight():
    points, labels = everything(TwoPoints(samples=1000))
    assert (points.shape, points.dtype) == ((1000, 1), torch.float32)
    values, counts = points.unique(return_counts=True)
    assert (values.tolist(), counts.tolist()) == ([-2.0, 2.0], [500, 500])
    assert labels.unique().tolist() == [0]


def test_moons_lie_on_two_half_circles():
    points = everything(Moons(samples=500, noise=0.0))[0].double()
    to_outer = (points.norm(dim=1) - 1).abs() + points[:, 1].clamp(max=0).abs()
    below = points - torch.tensor([1.0, 0.5])
    to_inner = (below.norm(dim=1) - 1).abs() + below[:, 1].clamp(min=0).abs()
    assert torch.minimum(to_outer, to_inner).max() < 1e-6
    assert (to_outer < 1e-6).sum() == 250


def test_checkerboard_fills_the_dark_squares_evenly():
    points, _ = everything(Checkerboard(samples=8000))
    squares = (points + 2).floor().long()
    assert squares.min() == 0
    assert squares.max() == 3
    assert (squares.sum(dim=1) % 2 == 0).all()
    counts = (squares[:, 0] * 4 + squares[:, 1]).bincount().tolist()
    assert all(850 < count < 1150 for count in counts if count)
    assert sum(count > 0 for count in counts) == 8
    inside = points - points.floor()
    assert inside.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)


@pytest.mark.parametrize("kind", [Moons, Checkerboard])
def test_toys_depend_on_seed_and_split_alone(kind):
    prints = [kind(samples=50, seed=seed).fingerprint(split) for seed in (0, 1) for split in ("train", "test")]
    assert len(set(prints)) == 4
    assert kind(samples=50, batch_size=3).fingerprint("train") == prints[0]


def test_toys_refuse_nonsense():
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        TwoPoints(samples=0)
    with pytest.raises(ValueError, match=r"noise must not be negative, got -0\.1"):
        Moons(noise=-0.1)


def test_fingerprints_follow_pixels_and_labels():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    changed = images.clone()
    changed[1, 0, 3, 3] = 1
    variants = [
        InMemoryDataset(images),
        InMemoryDataset(changed),
        InMemoryDataset(images, torch.tensor([0, 1])),
        InMemoryDataset(images.reshape(2, 1, 2, 8)),
    ]
    assert len({variant.fingerprint() for variant in variants}) == 4
    assert InMemoryDataset(images.clone()).fingerprint() == variants[0].fingerprint()
    assert all(len(variant.fingerprint()) == 16 for variant in variants)


def test_classes_that_are_not_equally_frequent_are_warned_of(recwarn):
    images = torch.zeros(30, 1, 2, 2, dtype=torch.uint8)
    for labels in (None, torch.arange(30) % 3, torch.tensor([0] * 10 + [1] * 20)):
        warn_of_uneven_classes(InMemoryDataset(images, labels))
    warn_of_uneven_classes(object())
    assert not recwarn
    with pytest.warns(UserWarning, match="hold 9 to 21 images each"):
        warn_of_uneven_classes(InMemoryDataset(images, torch.tensor([0] * 9 + [1] * 21)))
