"""File systems that lack what a save would like to have: symbolic and hard links, inodes, fsync of folders."""

import errno
import os
import stat
from pathlib import Path

import pytest

from fmlit.core.errors import FileError
from fmlit.core.files import atomic_write
from fmlit.training.callbacks import Checkpoint
from fmlit.training.callbacks.checkpoint import link
from tests.helpers.small_runs import digits_module, fit, names
from tests.helpers.tiny_cli import runs_in, train


def refuse(code):
    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call


def fail_links(monkeypatch, symbolic=errno.EOPNOTSUPP, hard=errno.EPERM, copy=errno.ENOSPC):
    for owner, name, code in ((Path, "symlink_to", symbolic), (os, "link", hard)):
        if code:
            monkeypatch.setattr(owner, name, refuse(code))
    if copy:
        monkeypatch.setattr("fmlit.training.callbacks.checkpoint.shutil.copyfileobj", refuse(copy))


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize("hard", [0, errno.EOPNOTSUPP])
def test_a_run_trains_and_resumes_where_there_are_no_symbolic_links(tmp_path, monkeypatch, code, hard):
    fail_links(monkeypatch, code, hard, copy=0)
    assert train(tmp_path, "--images=160").code == 0
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    assert not (checkpoints / "last.ckpt").is_symlink()
    assert "resumed after 10 steps" in train(tmp_path, "--images=320", "--resume").out
    assert (checkpoints / "last.ckpt").read_bytes() == (checkpoints / "000000320.ckpt").read_bytes()
    (checkpoints / "last.ckpt").unlink()
    assert "resumed after 20 steps" in train(tmp_path, "--images=400", "--resume").out


def test_a_link_that_cannot_be_made_ends_the_run_in_one_line_unless_it_continues(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_links(patch, symbolic=errno.ENOSPC, hard=errno.EPERM)
        outcome = train(tmp_path)
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    assert outcome.code == 75  # another try may find room
    assert outcome.err.startswith(
        f"error: cannot link {checkpoints / 'last.ckpt'} to 000000080.ckpt: No space left on device; "
    )
    assert names(checkpoints, "*.ckpt") == ["000000080.ckpt"]
    assert "resumed after 5 steps" in train(tmp_path, "--resume").out


def test_a_run_that_continues_tries_the_link_again(tmp_path, monkeypatch, caplog):
    calls = []

    def symlink_to(path, target):
        calls.append(target)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.symlink(target, path)

    fail_links(monkeypatch, symbolic=0)
    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    fit(digits_module(), tmp_path, 4, Checkpoint(24, on_error="continue"))
    assert calls == ["000000024.ckpt", "000000048.ckpt"]
    assert [text for text in caplog.messages if "No space left on device" in text and "training goes on" in text]
    assert os.readlink(tmp_path / "checkpoints" / "last.ckpt") == "000000048.ckpt"


def test_a_resume_goes_on_without_the_link(tmp_path, monkeypatch, caplog):
    assert train(tmp_path, "--images=160").code == 0
    (tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt").unlink()
    fail_links(monkeypatch)
    again = train(tmp_path, "--images=160", "--resume")
    assert again.code == 0
    assert [text for text in caplog.messages if "cannot link" in text and text.endswith("training goes on")]
    assert runs_in(tmp_path) == ["tiny"]


def test_the_first_reason_is_given_and_nothing_is_left(tmp_path, monkeypatch):
    fail_links(monkeypatch)
    (tmp_path / "5.ckpt").touch()
    with pytest.raises(FileError, match=r"last.ckpt to 5.ckpt: Operation not supported \(copying: No space left"):
        link(tmp_path / "last.ckpt", tmp_path / "5.ckpt")
    assert names(tmp_path, ".*") + names(tmp_path, "*.ckpt") == ["5.ckpt"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO, errno.EBADF, errno.ENOTSUP])
def test_a_save_does_not_need_the_fsync_of_its_folder(tmp_path, monkeypatch, code):
    fsync = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert train(tmp_path).code == 0


def test_an_error_of_the_clean_up_does_not_hide_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    monkeypatch.setattr(Path, "unlink", refuse(errno.EROFS))
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "file") as file:
        file.write(b"content")
