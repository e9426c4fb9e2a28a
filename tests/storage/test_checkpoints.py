"""Checkpoints are written with faults for real: processes die at every write, fsync and rename, disks are full."""

import itertools
import multiprocessing
import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from fmlit.core import files
from fmlit.storage.checkpoints import AtomicCheckpointIO, find_damage, load, newest_valid
from tests.helpers.checkpoint_files import checkpoint, flip, names, save

KILLED = 9


def in_child(function):
    """Run in a forked process, which may die; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    return process.exitcode


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

    monkeypatch.setattr(files.HashingWriter, "write", write)
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
            assert not find_damage(path), (event, names(folder), find_damage(path))
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
    assert not find_damage(path)
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
    assert not any(find_damage(tmp_path / name) for name in found)
    assert {load(tmp_path / name)["global_step"] for name in found} == {5}
    sidecars = [name.removesuffix(".sha256") for name in names(tmp_path) if name.endswith(".sha256")]
    assert sidecars == [name for name in found if not (tmp_path / name).is_symlink()]


def test_link_is_verified_as_the_file_that_it_links_to(tmp_path):
    save(tmp_path / "last.ckpt", 1)  # leaves a sidecar of its own, which must not be taken for the link's
    save(tmp_path / "step=2.ckpt", 2)
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").symlink_to("step=2.ckpt")
    assert not find_damage(tmp_path / "last.ckpt")
    flip(tmp_path / "step=2.ckpt")
    assert find_damage(tmp_path / "last.ckpt")
    save(tmp_path / "last.ckpt", 3)  # replaces the link, not its target
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert load(tmp_path / "last.ckpt")["global_step"] == 3
    assert find_damage(tmp_path / "step=2.ckpt")
