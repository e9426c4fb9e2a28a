"""Files that are damaged or forged: found, named, skipped, and never run."""

import logging
import os
import pickle
import zipfile

import pytest
import torch

import fmlit
from fmlit.core import files
from fmlit.storage import checkpoints
from fmlit.storage.checkpoints import AtomicCheckpointIO, find_damage, load, newest_valid
from tests.helpers.checkpoint_files import checkpoint, flip, save

DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>504 Gateway Time-out</html>"),
    "one bit flipped": flip,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("gone.ckpt")),
}


@pytest.mark.parametrize("sidecar", [True, False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_found_and_the_one_before_is_taken(tmp_path, damage, sidecar, caplog):
    older, newest = save(tmp_path / "step=1.ckpt", 1), save(tmp_path / "last.ckpt", 2)
    assert newest_valid(tmp_path) == newest
    DAMAGE[damage](newest)
    if not sidecar:
        (tmp_path / "last.ckpt.sha256").unlink()
    assert find_damage(newest)
    for read in (load, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises((ValueError, FileNotFoundError), match=r"last\.ckpt") as error:
            read(newest)
        assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert newest_valid(tmp_path) == older
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "last.ckpt" in warnings[0]
    assert "\n" not in warnings[0]
    older.write_text("")
    with pytest.raises(ValueError, match=f"no usable checkpoint in {tmp_path} .2 damaged"):
        newest_valid(tmp_path)


def test_any_flipped_byte_is_found_or_harmless_even_without_sidecar(tmp_path):
    path = save(tmp_path / "last.ckpt", 1)
    (tmp_path / "last.ckpt.sha256").unlink()
    intact, found = path.read_bytes(), 0
    for position in range(0, len(intact), 5):
        flip(path, position)
        try:
            harmless = load(path)  # padding of the archive
            assert torch.equal(harmless["state_dict"]["w"], checkpoint(1)["state_dict"]["w"])
        except ValueError:
            found += 1
        path.write_bytes(intact)
    assert found > 100


def test_any_flipped_byte_leaves_the_choice_of_the_newest_intact(tmp_path):
    older, newest = save(tmp_path / "step=1.ckpt", 1), save(tmp_path / "last.ckpt", 2)
    intact = newest.read_bytes()
    for position in range(0, len(intact), 23):
        flip(newest, position)
        assert newest_valid(tmp_path) == older, position
        newest.write_bytes(intact)


def test_damaged_sidecar_is_not_mistaken_for_none(tmp_path):
    path = save(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt.sha256").write_bytes(b"\xff\xfe")
    assert "last.ckpt.sha256 holds no SHA-256" in find_damage(path)


def test_newest_is_by_images_seen_not_by_date(tmp_path):
    save(tmp_path / "last.ckpt", 7)
    save(tmp_path / "a.ckpt", 9)
    save(tmp_path / "b.ckpt", 8)
    os.utime(tmp_path / "a.ckpt", (0, 0))
    assert newest_valid(tmp_path).name == "a.ckpt"
    save(tmp_path / "last.ckpt", 9)
    assert newest_valid(str(tmp_path)).name == "last.ckpt"  # among equals


def test_folder_without_checkpoints(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"no usable checkpoint in {folder} .0 damaged"):
            newest_valid(folder)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="is a URL"):
        load("https://example.org/last.ckpt")


# --- strangers


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, new_format, caplog):
    payload, path = tmp_path / "payload", tmp_path / "last.ckpt"
    forged = checkpoint(5) | {"callbacks": Payload(payload)}
    torch.save(forged, path, _use_new_zipfile_serialization=new_format)
    checkpoints._record(path, [files.sha256(path)])  # a stranger can write that too
    with pytest.raises(ValueError, match="refused.*system" if new_format else "cannot be read") as error:
        load(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=None)
    with pytest.raises(ValueError, match="weights_only=False could run code"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        fmlit.load(path)
    with pytest.raises(ValueError, match="no usable checkpoint"):
        newest_valid(tmp_path)
    assert not payload.exists()
    pickle.loads(pickle.dumps(forged["callbacks"]))  # the payload would have worked
    assert payload.exists()


def test_no_message_proposes_to_run_what_a_file_holds(tmp_path):
    """torch's own says how, where a pickle inside an intact archive is not one."""
    torch.save(checkpoint(5), tmp_path / "intact.ckpt")
    with zipfile.ZipFile(tmp_path / "intact.ckpt") as old, zipfile.ZipFile(tmp_path / "last.ckpt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[: len(content) // 2] + b"x" if name.endswith("data.pkl") else content)
    with pytest.raises(ValueError, match=r"last.ckpt cannot be read: ") as error:
        load(tmp_path / "last.ckpt")
    assert "weights_only" not in str(error.value)
    assert "trust" not in str(error.value)
