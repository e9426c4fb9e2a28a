"""Mistakes in files and in resuming: one line that names the file or the key, and nothing half-made is left."""

import functools
import shutil
from pathlib import Path

import pytest
import torch

import fmlit
from fmlit.cli import sample as sampling
from fmlit.cli.options import run
from fmlit.storage.checkpoints import AtomicCheckpointIO, load
from tests.helpers.tiny_cli import runs_in, train


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_picture_is_named_and_no_run_is_left(tmp_path: Path, workers: int) -> None:
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for name in ("a", "b", "c"):
        Image.effect_noise((16, 16), 50).save(tmp_path / "pictures" / f"{name}.png")
    broken = tmp_path / "pictures" / "b.png"
    broken.write_bytes(broken.read_bytes()[:100])
    outcome = train(
        tmp_path,
        *("--data=ImageFolder", f"--data.root={tmp_path / 'pictures'}", "--data.size=8", "--data.batch_size=3"),
        f"--data.num_workers={workers}",
    )
    assert outcome.error.startswith(f"cannot read the picture {broken}")
    assert not runs_in(tmp_path)


@pytest.mark.parametrize("download", ["true", "false"])
def test_truncated_mnist_is_named_and_no_run_is_left(tmp_path: Path, download: str) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{part}-ubyte").write_bytes(b"\0\0\x08\x03" + bytes(100))
    outcome = train(tmp_path, "--data=MNIST", f"--data.root={tmp_path}", f"--data.download={download}")
    assert f"{folder / 'train-images-idx3-ubyte'} is truncated or damaged" in outcome.error
    assert not runs_in(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    assert f"cannot create a run folder in {tmp_path / 'runs'}" in train(tmp_path).error


def test_resuming_another_model_names_the_keys_that_differ(tmp_path: Path) -> None:
    assert train(tmp_path).code == 0
    config = tmp_path / "runs" / "tiny" / "config.yaml"
    before = config.read_text()

    error = train(tmp_path, "--resume", "--model.net.width=16").error
    assert error.startswith("model.net.width (8 there, 16 here): ")
    assert str(tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt") in error

    error = train(tmp_path, "--resume", "--model=ScoreMatchingModule", "--data=fmlit.Moons").error
    assert "model.net.shape ([1] there, [2] here)" in error
    assert "model.path (fmlit.CondOTPath there, fmlit.VPPath here)" in error

    muon = ("--model.net.width=16", "--model.optimizer=Muon")
    assert train(tmp_path, *muon, "--name=muon").code == 0
    error = train(tmp_path, *muon[:1], "--name=muon", "--resume").error
    assert error.startswith("model.optimizer (Muon there, AdamW here): ")
    shutil.rmtree(tmp_path / "runs" / "muon")

    assert "keep ema.half_lives" in train(tmp_path, "--resume", "--images=640", "--ema.half_lives=[50]").error
    assert config.read_text() == before
    assert runs_in(tmp_path) == ["tiny"]


def test_a_run_of_before_its_network_had_an_option_goes_on(tmp_path: Path) -> None:
    unet = ("--model.net=UNet", "--model.net.channels=16", "--model.net.multipliers=[1]", "--model.net.attention=[]")
    unet += ("--model.net.head_channels=16", "--model.net.blocks=1", "--data=fmlit.Digits", "--data.batch_size=4")
    assert train(tmp_path, *unet, "--trainer.max_steps=1").code == 0
    path = tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt"
    checkpoint = load(path)
    described = checkpoint["model_description"]["init_args"]["net"]["init_args"]
    assert described.pop("scale_shift") is False
    assert described.pop("norm_groups") == 4
    AtomicCheckpointIO().save_checkpoint(checkpoint, path.resolve())
    error = train(tmp_path, *unet, "--trainer.max_steps=2", "--resume", "--model.net.scale_shift=true").error
    assert error.startswith("model.net.scale_shift (False there, True here): ")
    assert train(tmp_path, *unet, "--trainer.max_steps=2", "--resume").summary["steps"] == 2


def test_a_run_with_coupled_noise_is_not_sampled_by_an_sde(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coupled = ("--model.draws.coupling=OptimalTransportCoupling", "--model.draws.coupling.group_size=4")
    assert train(tmp_path, *coupled, "--trainer.max_steps=1").code == 0
    folder = tmp_path / "runs" / "tiny"
    assert fmlit.load(folder / "checkpoints" / "last.ckpt").coupled
    for solver in ("euler_maruyama", "churn"):
        arguments = ["--checkpoint", str(folder), "--solver", solver, "--steps", "2", "--out", str(tmp_path / "x.png")]
        with pytest.raises(SystemExit) as stopped:
            run(sampling.sample, arguments)
        assert stopped.value.code == 2
        assert "needs the score, which does not follow from the velocity" in capsys.readouterr().err
    # It may go on without: what a checkpoint says is how it was last trained.
    assert train(tmp_path, "--trainer.max_steps=2", "--resume").summary["steps"] == 2
    assert not fmlit.load(folder / "checkpoints" / "last.ckpt").coupled


def test_resuming_the_same_description_with_other_weights_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the network's class was changed between the runs: no 20 lines of Lightning's."""
    assert train(tmp_path).code == 0
    from fmlit.models.mlp import MLP

    monkeypatch.setattr(MLP, "__init__", _with_another_layer(MLP.__init__))
    error = train(tmp_path, "--resume").error
    assert error.startswith("model.net.extra.weight (nothing there, [2, 2] here), model.net.extra.bias")


def _with_another_layer(original):
    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.extra = torch.nn.Linear(2, 2)

    return init


@pytest.mark.filterwarnings("ignore")
def test_resuming_without_a_checkpoint_that_verifies_says_so(tmp_path: Path) -> None:
    assert train(tmp_path).code == 0
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    for path in checkpoints.glob("*.ckpt"):
        if not path.is_symlink():
            path.write_bytes(path.read_bytes()[:-1000])
    assert train(tmp_path, "--resume").error.startswith(f"no usable checkpoint in {checkpoints}")
    assert runs_in(tmp_path) == ["tiny"]
