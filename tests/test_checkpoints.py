"""Faults are injected for real: processes die at every write, fsync and rename, disks are full, files are damaged."""

import itertools
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from fmlit import checkpoints
from fmlit.checkpoints import AtomicCheckpointIO, load, load_model, newest_valid, verify
from fmlit.descriptions import describe
from fmlit.generative import GenerativeModel
from fmlit.networks import MLP
from fmlit.paths import CosinePath
from fmlit.predictions import Velocity

KILLED = 9


def checkpoint(step, size=40):
    values = torch.arange(size, dtype=torch.float32) + step
    return {"global_step": step, "images_seen": 128 * step, "state_dict": {"w": values}, "callbacks": {"a": [1, None]}}


def save(path, step=1, **options):
    AtomicCheckpointIO().save_checkpoint(checkpoint(step, **options), path)
    return path


def in_child(function):
    """Run in a forked process, which may die; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    return process.exitcode


def flip(path, position=None):
    """Flip one bit, by default of the tensor's data, so that the file still loads."""
    data = bytearray(path.read_bytes())
    if position is None:
        position = data.index(torch.tensor([7.0, 8.0, 9.0]).numpy().tobytes())
    data[position] ^= 1
    path.write_bytes(data)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- writing


def test_round_trip(tmp_path):
    path = save(str(tmp_path / "new" / "last.ckpt"), 3)
    for loaded in (load(path), AtomicCheckpointIO().load_checkpoint(path)):
        assert torch.equal(loaded["state_dict"].pop("w"), checkpoint(3)["state_dict"].pop("w"))
        assert loaded == checkpoint(3) | {"state_dict": {}}
    assert names(tmp_path / "new") == ["last.ckpt", "last.ckpt.sha256"]


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
def test_sidecar_is_what_sha256sum_reads(tmp_path):
    save(tmp_path / "last.ckpt", 1)
    save(tmp_path / "last.ckpt", 2)
    check = ["sha256sum", "--check", "--strict", "last.ckpt.sha256"]
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    flip(tmp_path / "last.ckpt")
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def die_at(event, monkeypatch):
    """Make the process die in the middle of a write (every 8th counts), or before an fsync or a rename."""
    events, writes = itertools.count(), itertools.count()

    def write(self, data):
        self.sha256.update(data)
        if next(writes) % 8 == 0 and next(events) == event:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            os._exit(KILLED)
        return self.file.write(data)

    def dying(call):
        return lambda *args: os._exit(KILLED) if next(events) == event else call(*args)

    monkeypatch.setattr(checkpoints._HashingWriter, "write", write)
    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(os, "replace", dying(os.replace))


@pytest.mark.parametrize(("name", "sidecar"), [("last.ckpt", True), ("last.ckpt", False), ("step=2.ckpt", True)])
def test_kill_at_any_point_of_a_save_leaves_a_valid_checkpoint(tmp_path, name, sidecar):
    outcomes = []
    for event in itertools.count():
        folder = tmp_path / str(event)
        save(folder / "last.ckpt", 1)
        if not sidecar:
            (folder / "last.ckpt.sha256").unlink()

        def second_save(folder=folder, event=event):
            with pytest.MonkeyPatch.context() as monkeypatch:
                die_at(event, monkeypatch)
                save(folder / name, 2)

        code = in_child(second_save)
        assert code in (0, KILLED)
        for path in folder.glob("*.ckpt"):
            assert verify(path), (event, names(folder), verify(path))
        newest = newest_valid(folder)
        step = load(newest)["global_step"]
        assert torch.equal(load(newest)["state_dict"]["w"], checkpoint(step)["state_dict"]["w"])
        outcomes.append(step)
        save(folder / "last.ckpt", 3)  # the next save cleans up
        assert not [file for file in names(folder) if file.startswith(".")]
        assert all((folder / file.removesuffix(".sha256")).exists() for file in names(folder))
        if code == 0:
            break
    assert len(outcomes) > 10
    assert outcomes == sorted(outcomes)  # the old one up to some point, the new one from there on
    assert set(outcomes) == {1, 2}


def test_folder_of_temporary_files_is_not_used(tmp_path, monkeypatch):
    moves, replace = [], os.replace

    def recording(source, target):
        moves.append((Path(source).parent, Path(target).parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", recording)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "does-not-exist"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    save(tmp_path / "run" / "last.ckpt")
    assert moves
    assert {folder for move in moves for folder in move} == {tmp_path / "run"}


def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = save(tmp_path / "last.ckpt", 1)

    def too_large():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(OSError, match=f"cannot write checkpoint last.ckpt in {tmp_path}: File too large") as error:
            save(path, 2, size=100_000)
        assert "\n" not in str(error.value)

    assert in_child(too_large) == 0
    assert names(tmp_path) == ["last.ckpt", "last.ckpt.sha256"]
    assert verify(path)
    assert load(path)["global_step"] == 1


def test_unwritable_folder_is_named():
    folder = Path(tempfile.mkdtemp())
    try:
        save(folder / "last.ckpt", 1)
        folder.chmod(0o555)

        def without_rights():
            if os.getuid() == 0:
                os.setuid(65534)
            for path in (folder / "last.ckpt", folder / "deeper" / "new.ckpt"):
                with pytest.raises(OSError, match=f"in {path.parent}: Permission denied"):
                    save(path, 2)

        assert in_child(without_rights) == 0
        assert names(folder) == ["last.ckpt", "last.ckpt.sha256"]
        assert load(folder / "last.ckpt")["global_step"] == 1
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_file_as_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"in {tmp_path / 'file'}: File exists"):
        save(tmp_path / "file" / "last.ckpt")


def test_save_refuses_what_could_not_be_loaded_again(tmp_path):
    path = save(tmp_path / "last.ckpt", 1)
    with pytest.raises(ValueError, match=r"would hold pathlib.*Path, which could not be loaded again"):
        AtomicCheckpointIO().save_checkpoint({"global_step": 2, "folder": tmp_path}, path)
    assert names(tmp_path) == ["last.ckpt", "last.ckpt.sha256"]
    assert load(path)["global_step"] == 1


def test_removal_takes_the_sidecar_along(tmp_path):
    AtomicCheckpointIO().remove_checkpoint(save(tmp_path / "step=1.ckpt"))
    AtomicCheckpointIO().remove_checkpoint(str(tmp_path / "never-there.ckpt"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("save_last", [True, "link"])
def test_lightning_keeps_sidecars_right(tmp_path, save_last):
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.demos.boring_classes import BoringModel

    def fit(steps, resume=None):
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=save_last, enable_version_counter=False)
        trainer = pl.Trainer(
            max_steps=steps,
            plugins=[AtomicCheckpointIO()],
            callbacks=[saver],
            limit_val_batches=0,
            logger=False,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(BoringModel(), ckpt_path=resume)

    fit(3)
    first = newest_valid(tmp_path)
    assert (first.name, load(first)["global_step"]) == ("last.ckpt", 3)
    fit(5, resume=first)
    found = [name for name in names(tmp_path) if name.endswith(".ckpt")]
    assert "last.ckpt" in found
    assert len(found) == 2
    assert all(verify(tmp_path / name) for name in found)
    assert {load(tmp_path / name)["global_step"] for name in found} == {5}
    sidecars = [name.removesuffix(".sha256") for name in names(tmp_path) if name.endswith(".sha256")]
    assert sidecars == [name for name in found if not (tmp_path / name).is_symlink()]


def test_link_is_verified_as_the_file_that_it_links_to(tmp_path):
    save(tmp_path / "last.ckpt", 1)  # leaves a sidecar of its own, which must not be taken for the link's
    save(tmp_path / "step=2.ckpt", 2)
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").symlink_to("step=2.ckpt")
    assert verify(tmp_path / "last.ckpt")
    flip(tmp_path / "step=2.ckpt")
    assert not verify(tmp_path / "last.ckpt")
    save(tmp_path / "last.ckpt", 3)  # replaces the link, not its target
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert load(tmp_path / "last.ckpt")["global_step"] == 3
    assert not verify(tmp_path / "step=2.ckpt")


# --- damage

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
    verdict = verify(newest)
    assert not verdict
    assert verdict.reason
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
    assert "last.ckpt.sha256 holds no SHA-256" in verify(path).reason


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
    checkpoints._write_sidecar(path, [checkpoints._sha256(path)])  # a stranger can write that too
    with pytest.raises(ValueError, match="refused.*system" if new_format else "cannot be read") as error:
        load(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=None)
    with pytest.raises(ValueError, match="weights_only=False could run code"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        load_model(path)
    with pytest.raises(ValueError, match="no usable checkpoint"):
        newest_valid(tmp_path)
    assert not payload.exists()
    pickle.loads(pickle.dumps(forged["callbacks"]))  # the payload would have worked
    assert payload.exists()


# --- models


def model(seed=0, width=8):
    torch.manual_seed(seed)
    net = MLP((2,), num_classes=3, width=width, depth=1)
    return GenerativeModel(net, CosinePath(), Velocity(), (2,), 3)


def save_model(path, raw, averaged, prefix="", **changes):
    """What a training run writes; with a prefix, of a compiled network."""
    content = {
        "global_step": 1,
        "state_dict": {f"model.net.{prefix}{k}": v for k, v in raw.net.state_dict().items()}
        | {"metric": torch.ones(1)},
        "ema": {name: {prefix + k: v for k, v in m.net.state_dict().items()} for name, m in averaged.items()},
        "model_description": describe(raw),
    }
    AtomicCheckpointIO().save_checkpoint(content | changes, path)
    return path


def same_weights(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_model_comes_back_with_the_weights_that_were_asked_for(tmp_path, prefix):
    raw, slow, fast = model(1).train(), model(2), model(3)
    path = save_model(tmp_path / "last.ckpt", raw, {"slow": slow, "fast": fast}, prefix)
    for weights, expected in {"raw": raw, "ema": slow, "slow": slow, "fast": fast}.items():
        loaded = load_model(path, weights)
        assert same_weights(loaded, expected), weights
        assert not loaded.training
        assert loaded.path == CosinePath()
    x, t, labels = torch.randn(4, 2), torch.rand(4), torch.tensor([0, 1, 2, 3])
    assert torch.equal(load_model(path).velocity(x, t, labels), slow.eval().velocity(x, t, labels))


def test_a_copy_named_ema_is_the_ema(tmp_path):
    path = save_model(tmp_path / "last.ckpt", model(1), {"other": model(2), "ema": model(3)})
    assert same_weights(load_model(path), model(3))


def test_loaded_model_does_not_depend_on_the_file(tmp_path):
    path = save_model(tmp_path / "last.ckpt", model(1), {"ema": model(2)})
    loaded = load_model(path)
    path.write_bytes(bytes(path.stat().st_size))  # in place, under the mapping that `load` used
    assert same_weights(loaded, model(2))


@pytest.mark.parametrize(
    ("changes", "weights", "words"),
    [
        ({}, "fast", ["no weights 'fast'", "raw, slow"]),
        ({"ema": {}}, "ema", ["no weights 'ema'", "one of: raw"]),
        ({"ema": None}, "ema", ["no weights 'ema'", "one of: raw"]),
        ({"state_dict": {}}, "raw", ["do not fit", "missing (inputs.weight, inputs.bias, "]),
        ({"ema": {"slow": model(0, width=4).net.state_dict()}}, "ema", ["of another shape (inputs.weight"]),
        ({"ema": {"slow": model().net.state_dict() | {"new": torch.ones(1)}}}, "ema", ["1 unexpected (new)"]),
        ({"ema": {"slow": dict.fromkeys(model().net.state_dict(), 1)}}, "ema", ["shape"]),
        ({"ema": ["slow"]}, "slow", ["list"]),
        ({"model_description": {"class_path": "os.system"}}, "ema", ["'os.system' is refused", "--trust"]),
        ({"model_description": describe(model().net)}, "ema", ["MLP, not a GenerativeModel"]),
        ({"model_description": "MLP"}, "ema", ["a description is a dict"]),
    ],
)
def test_unfit_checkpoint_says_why_in_one_line(tmp_path, changes, weights, words):
    path = save_model(tmp_path / "last.ckpt", model(1), {"slow": model(2)}, **changes)
    with pytest.raises(ValueError, match=r"last\.ckpt") as error:
        load_model(path, weights)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_checkpoint_without_description(tmp_path):
    with pytest.raises(ValueError, match="does not describe its model"):
        load_model(save(tmp_path / "last.ckpt"))
