"""``scripts/export.py``: what is given away is the model, for fmlit and for diffusers alone."""

import json
import re
import runpy
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

import fmlit
from fmlit import Digits, solvers
from fmlit.cli.export import export as export_command
from fmlit.cli.main import main
from fmlit.cli.options import run
from fmlit.flows.paths import CondOTPath, CosinePath, GaussianPath, PolynomialPath, VPPath
from fmlit.flows.predictions import Data, Noise, PreconditionedVelocity, Prediction, Score, Velocity
from fmlit.models.generative_model import GenerativeModel
from fmlit.models.mlp import MLP
from fmlit.models.unet import UNet
from fmlit.storage import exports
from tests.helpers.known_model import known_model, save_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "export.py"


def unet_model(
    num_classes: int | None = 10, path: GaussianPath = CondOTPath(), prediction: Prediction = Velocity()
) -> GenerativeModel:
    """A small U-Net none of whose weights is zero."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), num_classes, channels=16, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=16)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return GenerativeModel(net, path, prediction, (1, 8, 8), num_classes).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_run(tmp_path_factory.mktemp("runs") / "unet", unet_model(), Digits()))


@pytest.fixture
def points() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(5, 1, 8, 8, generator=g), torch.rand(5, generator=g), torch.tensor([0, 3, 9, 10, 10])


@torch.no_grad()
def test_the_script_writes_a_folder_that_both_libraries_load(checkpoint, tmp_path, monkeypatch, capsys, points):
    out = tmp_path / "new" / "model"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--checkpoint", checkpoint, "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["files"] == sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert all(path.stat().st_mode & stat.S_IRGRP for path in out.rglob("*"))

    x, t, labels = points
    original = fmlit.load(f"{checkpoint}/checkpoints/last.ckpt")
    loaded = exports.load(out)
    assert not loaded.training
    assert torch.equal(loaded.velocity(x, t, labels), original.velocity(x, t, labels))
    assert said["parameters"] == sum(p.numel() for p in original.net.parameters())
    alone = UNet2DModel.from_pretrained(out / "diffusers").eval()
    assert torch.equal(alone(x, 1000 * t, labels).sample, original.net(x, t, labels))


def test_the_description_says_where_it_comes_from(checkpoint, tmp_path):
    stored = {}
    for weights in ("ema", "raw"):
        export_command(checkpoint, weights, str(tmp_path / weights))
        stored[weights] = exports.load(tmp_path / weights).net.state_dict()
        described = json.loads((tmp_path / weights / "model.json").read_text())
        assert (described["weights"], described["images_seen"]) == (weights, 1280)
    assert all(torch.equal(stored["raw"][name], value + 1) for name, value in stored["ema"].items())


def code_blocks(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("num_classes", [10, None])
def test_the_code_in_the_readme_runs(tmp_path, monkeypatch, num_classes):
    model = unet_model(num_classes)
    exports.save(model, tmp_path)
    monkeypatch.chdir(tmp_path)
    with_fmlit, alone = code_blocks(tmp_path)
    names: dict = {}
    exec(with_fmlit, names)
    assert names["samples"].shape == (16, 1, 8, 8)
    torch.manual_seed(3)
    exec(alone, names)
    torch.manual_seed(3)
    noise = torch.randn(16, 1, 8, 8)
    labels = None if num_classes is None else torch.zeros(16, dtype=torch.int64)
    with torch.no_grad():
        euler = solvers.euler(
            lambda x, t: model.velocity(x, t, labels), noise, torch.linspace(0, 1, 51, dtype=torch.float64)
        )
    assert torch.allclose(names["x"], euler, atol=1e-4)


@pytest.mark.parametrize("prediction", [Noise(), PreconditionedVelocity(0.4)])
def test_the_readme_of_other_predictions_gives_the_bare_output(tmp_path, monkeypatch, prediction):
    model = unet_model(path=VPPath(rate_max=15.0), prediction=prediction)
    exports.save(model, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert repr(prediction) in text
    assert "VPPath(rate_min=0.1, rate_max=15.0)" in text
    assert "log alpha =" in text  # the formula itself
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code_blocks(tmp_path)[1], names)
    with torch.no_grad():
        assert torch.equal(names["output"], model.net(names["x"], names["t"], names["labels"]))
    assert repr(exports.load(tmp_path).prediction) == repr(prediction)


PATHS = [CondOTPath(), CosinePath(), PolynomialPath(2), VPPath()]
PREDICTIONS = [Velocity(), Noise(), Data(), Score(), PreconditionedVelocity()]


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
def test_the_readme_samples_every_prediction_on_every_path(path, prediction, tmp_path, monkeypatch):
    exports.save(GenerativeModel(MLP((2,), width=8, depth=1), path, prediction, (2,)), tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code_blocks(tmp_path)[0], names)
    assert names["samples"].shape == (16, 2)
    assert names["samples"].isfinite().all()


class SquarePath(PolynomialPath):
    """Somebody's path."""

    def __init__(self) -> None:
        super().__init__(2)


def test_the_readme_of_somebodys_own_classes_trusts_their_package(tmp_path, monkeypatch):
    exports.save(known_model(path=SquarePath()), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert f"`{__name__}.SquarePath()`\n\nSomebody's path." in text
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code_blocks(tmp_path)[0], names)
    assert type(names["model"].path) is SquarePath


def test_other_networks_have_no_folder_for_diffusers(tmp_path, points):
    model = known_model()
    exports.save(model, tmp_path)
    expected = ["README.md", "SHA256SUMS", "model.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    x, t, labels = points
    assert torch.equal(exports.load(tmp_path).velocity(x, t, labels), model.velocity(x, t, labels))


def test_a_folder_is_written_as_a_whole_or_not_at_all(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    with pytest.raises(SystemExit) as stopped:
        run(export_command, ["--checkpoint", checkpoint, "--out", str(tmp_path / "taken")])
    assert stopped.value.code == 2
    assert "taken exists already: remove it, or choose another name" in capsys.readouterr().err
    monkeypatch.setattr(exports, "readme", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        export_command(checkpoint, out=str(tmp_path / "new"))
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "mine"]


def test_folders_that_do_not_hold_a_model(tmp_path):
    model = known_model()
    with pytest.raises(ValueError, match=r"does not hold an exported model: .*model\.json"):
        exports.load(tmp_path)
    exports.save(model, tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    weights = (tmp_path / "model.safetensors").read_bytes()

    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="does not hold an exported model"):
        exports.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)

    def described(class_path: str, **arguments) -> None:
        description["model"]["init_args"]["net"] = {"class_path": class_path, "init_args": arguments}
        (tmp_path / "model.json").write_text(json.dumps(description))

    described("fmlit.MLP", shape=[1, 8, 8], num_classes=10, width=16, depth=1)
    with pytest.raises(ValueError, match="16 of another shape"):
        exports.load(tmp_path)
    described("os.system", command="touch owned")
    with pytest.raises(ValueError, match=r"'os\.system' is refused"):
        exports.load(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({"model": {"class_path": "fmlit.VPPath", "init_args": {}}}))
    with pytest.raises(ValueError, match="describes a VPPath, not a GenerativeModel"):
        exports.load(tmp_path)


def run_command(capsys, *args):
    """The summary of a command."""
    main([str(arg) for arg in args])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_commands_take_an_export_as_they_take_its_run(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_command(checkpoint, "raw", "raw")
    scored = ["--n", 20, "--steps", 2, "--batch_size", 20, "--cache", "cache", "--out"]
    pixels, protocols = [], []
    for source, options in {checkpoint: ["--weights", "raw"], "raw": []}.items():
        file = f"{len(pixels)}.npz"
        run_command(capsys, "sample", "--checkpoint", source, "--n", 10, "--steps", 2, "--save_images", file, *options)
        pixels.append(np.load(file)["arr_0"])
        options += ["--data", "Digits"] if source == "raw" else []
        result = run_command(capsys, "evaluate", "--checkpoint", source, *scored, f"{len(pixels)}", *options)
        protocols.append((result["cells"][0]["protocol"], result["cells"][0]["scores"]))
    assert np.array_equal(*pixels)
    assert protocols[0] == protocols[1]
    assert "-raw-" in protocols[0][0]
    again = run_command(capsys, "export", "--checkpoint", "raw", "--dtype", "float16", "--out", "half")
    assert again["weights"] == "raw"
    assert exports.read_description(Path("half"))["images_seen"] == 1280
    with pytest.raises(SystemExit):
        main(["evaluate", "--checkpoint", "raw"])
    assert (
        capsys.readouterr().err
        == "error: raw is an export, which does not name its training data; give them by --data\n"
    )
