"""MNIST and CIFAR-10 in small forgeries of their official formats: whole, broken, missing, read-only, downloaded."""

import gzip
import hashlib
import os
import pickle
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

import fmlit.data.mnist
from fmlit import CIFAR10, MNIST


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder, and the local address at which it can be downloaded from."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def mnist_files(monkeypatch):
    """Contents of the four files of an MNIST with 5 training and 3 test images, and their official sums."""
    generator = np.random.default_rng(0)
    files = {}
    for part, count in (("train", 5), ("t10k", 3)):
        pixels = generator.integers(0, 256, count * 28 * 28, dtype=np.uint8).tobytes()
        labels = bytes(i % 10 for i in range(count))
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">IIII", 0x803, count, 28, 28) + pixels
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">II", 0x801, count) + labels
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(fmlit.data.mnist, "SHA256", sums)
    return files


@pytest.fixture
def mnist_mirror(mnist_files, site, monkeypatch):
    """The folder behind what torchvision takes for the download site."""
    from torchvision.datasets import MNIST as Published

    folder, address = site
    resources = []
    for name, content in mnist_files.items():
        packed = gzip.compress(content)
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(Published, "mirrors", [address])
    monkeypatch.setattr(Published, "resources", resources)
    return folder


def fill(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def state(root):
    """Names and times of change of everything below a folder, and of the folder."""
    return {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}


def test_mnist_downloads_reads_and_leaves_nothing_else(mnist_files, mnist_mirror, tmp_path):
    data = MNIST(str(tmp_path / "data"))
    data.prepare_data()
    assert sorted(path.name for path in tmp_path.glob("data/**/*")) == sorted(["MNIST", "raw", *mnist_files])
    images = data.dataset("train")
    assert len(images) == 5
    assert images[3][1] == 3
    pixels = mnist_files["train-images-idx3-ubyte"][16:]
    assert images[3][0].numpy().tobytes() == pixels[3 * 784 : 4 * 784]
    assert images[3][0].shape == (1, 28, 28)
    assert len(data.dataset("test")) == 3


def test_mnist_download_that_breaks_off_leaves_no_file(mnist_files, mnist_mirror, tmp_path):
    (mnist_mirror / "t10k-labels-idx1-ubyte.gz").write_bytes(b"half")
    with pytest.raises(
        FileNotFoundError, match=r"train-images-idx3-ubyte is missing and the download failed"
    ) as caught:
        MNIST(str(tmp_path / "data")).prepare_data()
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.glob("data/**/*")] == ["MNIST", "raw"]


def test_mnist_keeps_the_files_that_are_there(mnist_files, mnist_mirror, tmp_path):
    raw = tmp_path / "data/MNIST/raw"
    names = list(mnist_files)
    fill(raw, {name: mnist_files[name] for name in names[:2]})
    before = state(raw)
    MNIST(str(tmp_path / "data")).prepare_data()
    after = state(raw)
    assert all(after[raw / name] == before[raw / name] for name in names[:2])
    assert {path.name for path in raw.iterdir()} == set(names)


@pytest.mark.parametrize("download", [True, False])
def test_mnist_in_a_read_only_folder(mnist_files, tmp_path, download):
    root = tmp_path / "data"
    fill(root / "MNIST/raw", mnist_files)
    folders = [root / "MNIST/raw", root / "MNIST", root]
    before = state(root)
    try:
        for folder in folders:
            folder.chmod(0o555)  # no obstacle to root, hence the comparison of times as well
        data = MNIST(str(root), download=download)
        data.prepare_data()
        assert len(data.dataset("train")) == 5
        assert state(root) == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-100], lambda content: content[:-1] + b"\xff", lambda _: b""]
)
@pytest.mark.parametrize("download", [True, False])
def test_damaged_mnist_file_is_named(mnist_files, tmp_path, damage, download):
    name = "train-images-idx3-ubyte"
    fill(tmp_path / "MNIST/raw", {**mnist_files, name: damage(mnist_files[name])})
    data = MNIST(str(tmp_path), download=download)
    data.prepare_data()
    with pytest.raises(ValueError, match=f"{name} is truncated or damaged .*; delete it") as caught:
        data.dataset("train")
    assert "\n" not in str(caught.value)
    assert len(data.dataset("test")) == 3


def test_missing_mnist_without_download(mnist_files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*MNIST/raw; put the official files .*download: true$"):
        MNIST(str(tmp_path), download=False)
    fill(tmp_path / "MNIST/raw", dict(list(mnist_files.items())[:1]))
    with pytest.raises(FileNotFoundError, match=r"train-labels-idx1-ubyte is missing; put"):
        MNIST(str(tmp_path), download=False).dataset("train")


def test_folder_that_cannot_be_written(mnist_files, tmp_path):
    (tmp_path / "data").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match=r"cannot write to .*data/MNIST/raw .*choose another root"):
        MNIST(str(tmp_path / "data")).prepare_data()


def test_folder_without_permission(mnist_files, mnist_mirror, tmp_path):
    root = tmp_path / "data"
    root.mkdir(mode=0o555)
    if os.access(root, os.W_OK):
        pytest.skip("root may write anywhere")
    with pytest.raises(ValueError, match=r"cannot write to .*choose another root"):
        MNIST(str(root)).prepare_data()


@pytest.fixture
def cifar_files(site, monkeypatch):
    """Contents of the files of a CIFAR-10 with two images per batch; torchvision's sums and address follow them."""
    from torchvision.datasets import CIFAR10 as Published

    generator = np.random.default_rng(0)

    def batch(first):
        pixels = generator.integers(0, 256, (2, 3072), dtype=np.uint8)
        return pickle.dumps({"data": pixels, "labels": [first, first + 1]}, protocol=2)

    files = {f"data_batch_{i}": batch(i) for i in range(1, 6)}
    files["test_batch"] = batch(0)
    files["batches.meta"] = pickle.dumps({"label_names": [str(i) for i in range(10)]}, protocol=2)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(Published, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(Published, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(Published, "meta", {**Published.meta, "md5": sums["batches.meta"]})

    folder, address = site
    fill(folder / "cifar-10-batches-py", files)
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(Published, "url", address + archive.name)
    monkeypatch.setattr(Published, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return files


def test_cifar10_downloads_and_reads(cifar_files, tmp_path):
    data = CIFAR10(str(tmp_path / "data"))
    data.prepare_data()
    assert {path.name for path in tmp_path.glob("data/**/*")} == {"cifar-10-batches-py", *cifar_files}
    images = data.dataset("train")
    assert len(images) == 10
    assert data.dataset("train").batch(range(10))[1].tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    pixels = pickle.loads(cifar_files["data_batch_2"])["data"][1].reshape(3, 32, 32)
    assert torch.equal(images[3][0], torch.from_numpy(pixels))
    assert data.dataset("test").batch(range(2))[1].tolist() == [0, 1]
    assert data.horizontal_flip
    assert next(iter(data.train_dataloader()))["data"].shape == (128, 3, 32, 32)


def test_prefilled_cifar10_is_not_touched(cifar_files, tmp_path):
    site = tmp_path / "site"
    before = state(site)
    data = CIFAR10(str(site), horizontal_flip=False)
    data.prepare_data()
    assert len(data.dataset("test")) == 2
    assert state(site) == before


def test_damaged_cifar10_file_is_named_before_it_is_unpickled(cifar_files, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "site/cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"data_batch_3 is truncated or damaged .*; delete it"):
        CIFAR10(str(tmp_path / "site"), download=False).dataset("train")
    assert not (tmp_path / "executed").exists()


def test_missing_cifar10_without_download(cifar_files, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"CIFAR-10: there is no folder .*cifar-10-batches-py; put the official"
    ):
        CIFAR10(str(tmp_path / "nowhere"), download=False)
