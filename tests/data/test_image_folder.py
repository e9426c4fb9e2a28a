"""Pictures of every sort, broken ones included."""

import os
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import fmlit
from fmlit import ImageFolder
from fmlit.core.errors import FileError
from fmlit.core.processes import ProcessGroup
from fmlit.data.decoding import find_pictures, read_picture


def save(path, array=None, color=(200, 30, 90), size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, color) if array is None else Image.fromarray(array)
    image.save(path, **options)
    return path


@pytest.fixture
def two_classes(tmp_path):
    root = tmp_path / "pictures"
    save(root / "dogs/b.JPG")
    save(root / "dogs/deep/er/a.png")
    save(root / "cats/z.webp", lossless=True)
    save(root / ".thumbnails/x.png")
    save(root / "cats/.hidden.png")
    (root / "cats/notes.txt").write_text("not a picture")
    (root / "empty").mkdir()
    return root


def test_folders_are_classes_and_everything_else_is_left_out(two_classes):
    data = ImageFolder(str(two_classes), size=4)
    assert data.class_names == ["cats", "dogs"]
    assert (data.num_classes, data.shape) == (2, (3, 4, 4))
    assert find_pictures(two_classes) == ["cats/z.webp", "dogs/b.JPG", "dogs/deep/er/a.png"]
    items = data.dataset("train")
    images, labels = items.batch(range(len(items)))
    assert labels.tolist() == [0, 1, 1]
    assert images.dtype == torch.uint8
    assert [label for _, label in DataLoader(items, batch_size=None)] == [0, 1, 1]
    assert images[1].float().mean(dim=(1, 2)).tolist() == pytest.approx([200, 30, 90], abs=2)


def test_each_folder_counts_once_whatever_links_lead_to_it(two_classes, tmp_path):
    before = find_pictures(two_classes)
    (two_classes / "cats" / "loop").symlink_to(".")
    (two_classes / "dogs" / "top").symlink_to(two_classes)
    (two_classes / "cats" / "d").symlink_to(two_classes / "dogs")  # which comes first in the alphabet
    assert find_pictures(two_classes) == before
    (tmp_path / "more").mkdir()
    save(tmp_path / "more" / "m.png")
    (two_classes / "dogs" / "more").symlink_to(tmp_path / "more")
    assert find_pictures(two_classes) == sorted([*before, "dogs/more/m.png"])


def test_folders_that_all_link_to_each_other_are_walked_once(tmp_path):
    for name in "abcdefgh":
        save(tmp_path / name / "x.png")
        for other in "abcdefgh":
            (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    assert len(find_pictures(tmp_path)) == 8


def test_what_is_no_regular_file_is_not_waited_for(two_classes):
    before = find_pictures(two_classes)
    os.mkfifo(two_classes / "cats" / "pipe.png")
    (two_classes / "cats" / "gone.png").symlink_to("nowhere.png")
    assert find_pictures(two_classes) == before


def test_files_that_are_left_out_are_counted(two_classes):
    (two_classes / "dogs" / "c.avif").touch()
    (two_classes / "dogs" / "d.AVIF").touch()
    with pytest.warns(UserWarning, match=r"left out files that fmlit does not read as pictures \(2 .avif, 1 .txt\)"):
        ImageFolder(str(two_classes), size=4)


def test_the_headline_counts_pictures_by_class(two_classes):
    data = ImageFolder(str(two_classes), size=4)
    assert data.title == "ImageFolder (3 pictures of 2 classes: cats 1, dogs 2)"
    assert ImageFolder(str(two_classes), size=4, classes=False).title == "ImageFolder (3 pictures)"
    for name in "abcdef":
        save(two_classes / name / "x.jfif", format="JPEG")
    assert ImageFolder(str(two_classes), size=4).title.endswith("of 8 classes: a 1, b 1, c 1, cats 1, d 1, ...)")


def test_folders_that_look_like_splits_are_named(tmp_path):
    for name in ("train", "valid"):
        save(tmp_path / name / "x.png")
    with pytest.warns(UserWarning, match="train, valid are taken for classes; if they are splits, use data.root"):
        ImageFolder(str(tmp_path), size=4)
    save(tmp_path / "cats" / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageFolder(str(tmp_path), size=4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_broken_pictures_are_named_before_training(two_classes, num_workers, caplog):
    for name in ("one", "two"):
        (two_classes / "dogs" / f"{name}.png").write_bytes(b"no picture")
    ImageFolder(str(two_classes), size=4).prepare_data()  # only if asked to
    data = ImageFolder(str(two_classes), size=4, check=True, num_workers=num_workers)
    with pytest.raises(fmlit.UserError, match=f"2 of 5 pictures in {two_classes} cannot be read: see above"):
        data.prepare_data()
    named = [record.getMessage() for record in caplog.records]
    assert [text.split(" (")[0] for text in named] == [
        f"cannot read the picture {two_classes}/dogs/{name}.png" for name in ("one", "two")
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_pictures_are_left_out_if_asked_to(two_classes, num_workers, caplog):
    whole = ImageFolder(str(two_classes), size=4).dataset("train")
    for name in ("one", "two", "three", "four"):
        (two_classes / "dogs" / f"{name}.png").write_bytes(b"no picture")
    data = ImageFolder(str(two_classes), size=4, check="skip", num_workers=num_workers)
    data.prepare_data()
    data.setup("fit")
    dataset = data.dataset("train")
    assert (dataset.names, dataset.labels.tolist()) == (whole.names, whole.labels.tolist())
    assert data.identity() == {"items": 3, "fingerprint": whole.fingerprint()}
    warning = f"{two_classes}: left out 4 of 7 pictures, which cannot be read: dogs/four.png, dogs/one.png, "
    assert caplog.messages == [f"{warning}dogs/three.png, ..."]


def test_a_class_without_a_picture_that_can_be_read_is_not_left_out(two_classes):
    (two_classes / "cats/z.webp").write_bytes(b"no picture")
    with pytest.raises(fmlit.UserError, match="none of the pictures of class cats can be read"):
        ImageFolder(str(two_classes), size=4, check="skip", num_workers=0).prepare_data()


def test_all_processes_leave_out_what_the_first_could_not_read(two_classes, monkeypatch):
    first, other, late = (ImageFolder(str(two_classes), size=4, check="skip", num_workers=0) for _ in range(3))
    broken = two_classes / "dogs/b.JPG"
    content = broken.read_bytes()
    broken.write_bytes(b"no picture")
    first.prepare_data()
    broken.write_bytes(content)  # another node can read it
    other.prepare_data()
    assert len(other.dataset("train")) == 3

    def told(self, produce):
        return first._skipped

    monkeypatch.setattr(ProcessGroup, "from_first", told)
    for data in (other, late):
        data.setup("fit")
        assert data.dataset("train").names == ["cats/z.webp", "dogs/deep/er/a.png"]


def test_held_out_pictures_that_are_broken_are_left_out_as_well(two_classes, tmp_path):
    save(tmp_path / "test/dogs/1.png")
    (tmp_path / "test/dogs/2.png").write_bytes(b"no picture")
    data = ImageFolder(str(two_classes), 4, test_root=str(tmp_path / "test"), check="skip", num_workers=0)
    assert data.dataset("test").names == ["dogs/1.png"]


def test_pictures_without_classes(two_classes, tmp_path):
    flat = ImageFolder(str(two_classes), size=4, classes=False)
    assert (flat.num_classes, flat.class_names) == (None, None)
    assert flat.dataset("train").batch(range(3))[1].tolist() == [0, 0, 0]
    save(tmp_path / "loose/1.png")
    assert ImageFolder(str(tmp_path / "loose"), size=4).num_classes is None
    save(two_classes / "stray.png")
    with pytest.raises(ValueError, match=r"stray\.png lies beside class folders"):
        ImageFolder(str(two_classes), size=4)


def test_held_out_pictures_have_the_classes_of_the_training_pictures(two_classes, tmp_path):
    save(tmp_path / "test/dogs/1.png")
    data = ImageFolder(str(two_classes), size=4, test_root=str(tmp_path / "test"))
    assert data.dataset("test").batch(range(1))[1].tolist() == [1]
    save(tmp_path / "test/birds/1.png")
    with pytest.raises(ValueError, match=r"test/birds belongs to none of the classes cats, dogs"):
        ImageFolder(str(two_classes), size=4, test_root=str(tmp_path / "test")).dataset("test")
    with pytest.raises(ValueError, match="name their folder with test_root"):
        ImageFolder(str(two_classes), size=4).dataset("test")


def test_nonsense_is_refused(two_classes, tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        ImageFolder(str(tmp_path / "nowhere"), size=4)
    with pytest.raises(ValueError, match=r"no pictures in .*empty: fmlit reads \.png"):
        ImageFolder(str(two_classes / "empty"), size=4)
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        ImageFolder(str(two_classes), size=0)
    with pytest.raises(ValueError, match=r"num_workers must be 0 .* got -1"):
        ImageFolder(str(two_classes), size=4, num_workers=-1)


def test_the_central_square_of_the_shorter_side(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    save(tmp_path / "wide.png", wide)
    assert (read_picture(tmp_path / "wide.png", 10) == 255).all()
    save(tmp_path / "tall.png", wide.transpose(1, 0, 2).copy())
    assert (read_picture(tmp_path / "tall.png", 10) == 255).all()


def test_shrinking_averages_and_growing_fills(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = read_picture(save(tmp_path / "stripes.png", stripes), 8)
    assert (small.float() - 127.5).abs().max() < 12  # without averaging, all 0 or all 255
    assert read_picture(save(tmp_path / "tiny.png", size=(2, 3)), 8).shape == (3, 8, 8)


def color_of(path):
    square = read_picture(path, 4)
    assert square.shape == (3, 4, 4)
    assert square.dtype == torch.uint8
    return square[:, 1, 1].tolist()


def test_modes_become_rgb(tmp_path):
    rgba = np.tile(np.array([255, 0, 0, 128], np.uint8), (8, 8, 1))
    assert color_of(save(tmp_path / "rgba.png", rgba)) == pytest.approx([255, 127, 127], abs=1)
    clear = np.tile(np.array([9, 9, 9, 0], np.uint8), (8, 8, 1))
    assert color_of(save(tmp_path / "clear.webp", clear, lossless=True, exact=True)) == [255, 255, 255]
    gray_alpha = np.tile(np.array([0, 51], np.uint8), (8, 8, 1))
    assert color_of(save(tmp_path / "la.png", gray_alpha)) == pytest.approx([204] * 3, abs=1)
    assert color_of(save(tmp_path / "gray.png", np.full((8, 8), 70, np.uint8))) == [70, 70, 70]

    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "palette.gif")
    assert color_of(tmp_path / "palette.gif") == [10, 200, 30]
    palette.save(tmp_path / "see-through.png", transparency=1)
    assert color_of(tmp_path / "see-through.png") == [255, 255, 255]

    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    assert color_of(tmp_path / "bit.png") == [255, 255, 255]
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "print.jpg")
    assert color_of(tmp_path / "print.jpg") == pytest.approx([0, 0, 0], abs=2)


@pytest.mark.parametrize(("level", "gray"), [(0, 0), (257, 1), (32896, 128), (65535, 255)])
@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, level, gray, name):
    assert color_of(save(tmp_path / name, np.full((8, 8), level, np.uint16))) == [gray] * 3


@pytest.mark.parametrize("array", [np.full((8, 8), 70000, np.int32), np.full((8, 8), 0.5, np.float32)])
def test_levels_without_a_white_are_refused(tmp_path, array):
    with pytest.raises(FileError, match=r"odd\.tif .*no fixed white"):
        read_picture(save(tmp_path / "odd.tif", array), 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(tmp_path, orientation):
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4, :4] = 255  # one white corner: top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "turned.png", np.ascontiguousarray(stored), exif=exif)
    assert torch.equal(read_picture(path, 8), torch.from_numpy(upright).permute(2, 0, 1))


def broken_pictures(folder):
    """Files that carry the name of a picture and cannot be read as one."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    png, jpg = save(folder / "cut.png", noise), save(folder / "cut.jpg", noise)
    png.write_bytes(png.read_bytes()[:2000])
    jpg.write_bytes(jpg.read_bytes()[:1000])
    flipped = save(folder / "bit-rot.png", noise)
    content = bytearray(flipped.read_bytes())
    content[500] ^= 255
    flipped.write_bytes(content)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpeg").write_text("<html>404\nnot found</html>")
    (folder / "postscript.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    return find_pictures(folder)


def test_broken_pictures_are_named_in_one_line(tmp_path):
    names = broken_pictures(tmp_path)
    assert len(names) == 6
    for name in [*names, "gone.png"]:
        with pytest.raises(
            ValueError, match=rf"cannot read the picture .*{name} \(.*\): repair or remove it$"
        ) as caught:
            read_picture(tmp_path / name, 8)
        assert "\n" not in str(caught.value)


def test_postscript_never_reaches_ghostscript(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: called.append(True))
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(FileError):
        read_picture(tmp_path / "x.png", 8)
    assert not called


def test_decompression_bombs_are_refused(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(FileError, match=r"bomb\.png .50000x50000 pixels, and the limit is 100 megapixels"):
        read_picture(tmp_path / "bomb.png", 8)


def test_the_limit_on_pixels_is_an_option(tmp_path):
    save(tmp_path / "a.png", size=(40, 50))
    assert len(ImageFolder(str(tmp_path), 8, max_megapixels=0.002).dataset("train")[0]) == 2
    with pytest.raises(FileError, match=r"a\.png .40x50 pixels, and the limit is 0.001 megapixels"):
        ImageFolder(str(tmp_path), 8, max_megapixels=0.001).dataset("train")[0]


@pytest.mark.parametrize("plain_loader", [False, True])
def test_the_name_survives_the_way_out_of_a_worker(tmp_path, plain_loader):
    save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    data = ImageFolder(str(tmp_path), size=4, batch_size=4, num_workers=1)
    loader = DataLoader(data.dataset("train"), num_workers=1) if plain_loader else data.train_dataloader()
    with pytest.raises(ValueError, match=r"^cannot read the picture .*bad\.png \(.*\): repair or remove it$") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_workers_give_the_stream_of_the_training_process(tmp_path):
    for number in range(5):
        array = np.zeros((4, 4, 3), np.uint8)
        array[:, :2] = 50 * number + 5
        save(tmp_path / f"{number}.png", array)
    streams = []
    for num_workers in (0, 2):
        data = ImageFolder(str(tmp_path), size=4, batch_size=3, horizontal_flip=True, num_workers=num_workers)
        batches = iter(data.train_dataloader())
        streams.append(torch.cat([next(batches)["data"] for _ in range(6)]))
    assert torch.equal(*streams)
    flipped = streams[0][:, 0, 0, 3] > 0
    assert 0 < flipped.sum() < 18
    assert sorted(streams[0][:5].amax(dim=(1, 2, 3)).tolist()) == [5, 55, 105, 155, 205]


def test_the_data_set_travels_to_spawned_workers(two_classes):
    items = ImageFolder(str(two_classes), size=4).dataset("train")
    assert torch.equal(pickle.loads(pickle.dumps(items))[1][0], items[1][0])
    error = pickle.loads(pickle.dumps(FileError("cannot read")))
    assert (type(error), str(error)) == (FileError, "cannot read")


def test_the_fingerprint_follows_files_size_and_classes(two_classes):
    def fingerprint(**arguments):
        return ImageFolder(str(two_classes), **{"size": 4, **arguments}).fingerprint("train")

    first = fingerprint()
    assert first == fingerprint(seed=7, batch_size=2, horizontal_flip=True)
    later = os.stat(two_classes / "dogs/b.JPG").st_mtime_ns + 10**9
    variants = {first, fingerprint(size=5), fingerprint(classes=False)}
    os.utime(two_classes / "dogs/b.JPG", ns=(later, later))
    variants.add(fingerprint())
    save(two_classes / "dogs/c.png")
    variants.add(fingerprint())
    assert len(variants) == 5
