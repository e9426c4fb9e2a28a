"""``scripts/sample.py``: the samples that were asked for, in the files that were named, or a line that says why not."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fmlit
from fmlit import TwoPoints
from fmlit.cli import sample as sampling
from fmlit.cli.export import export
from fmlit.cli.options import Integers, Names, run
from fmlit.cli.sample import OutputFiles, SamplerOptions, choose_classes
from fmlit.core.files import new_folder
from fmlit.core.randomness import image_noise, image_seeds
from fmlit.core.tensors import to_uint8
from fmlit.sampling.grids import UniformGrid
from fmlit.solvers.records import SOLVERS
from tests.helpers.known_model import STD, known_model, save_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "sample.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_run(tmp_path_factory.mktemp("runs") / "known", known_model()))


def script(monkeypatch, capsys, *args: str) -> dict:
    """The line of JSON with which the script ends."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refusal(capsys, *args: object) -> str:
    """The one line on stderr."""
    with pytest.raises(SystemExit) as stopped:
        run(sampling.sample, [str(arg) for arg in args])
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_the_script_writes_what_it_says(checkpoint, tmp_path, monkeypatch, capsys):
    files = {"out": tmp_path / "new" / "grid.png", "save-images": tmp_path / "images.npz"}
    options = [part for name, path in files.items() for part in (f"--{name}", path)]
    said = script(
        monkeypatch, capsys, "--checkpoint", checkpoint, "--n", "23", "--seed", "3", "--steps", "60", *options
    )
    assert said["picture"] == str(files["out"])
    assert said["sampler"] == "heun60"
    assert Image.open(files["out"]).size == (10 * 50 + 2, 3 * 50 + 2)  # a column for each class
    with np.load(files["save-images"]) as stored:
        images, labels = stored["arr_0"], stored["arr_1"]
    truth = to_uint8(STD * image_noise(image_seeds(3, range(23)), (1, 8, 8))).permute(0, 2, 3, 1).numpy()
    assert np.abs(images.astype(int) - truth).max() <= 1
    assert labels.tolist() == [i % 10 for i in range(23)]


def test_a_larger_n_adds_to_the_same_images(checkpoint, tmp_path):
    for n in (5, 12):
        files = OutputFiles(f"{tmp_path}/{n}.png", save_images=f"{tmp_path}/{n}")
        sampling.sample(checkpoint, n=n, batch_size=4, labels=Names(["3"]), files=files)
    names = sorted(path.name for path in (tmp_path / "12").iterdir())
    assert names == [f"{i:06d}.png" for i in range(12)]
    for name in names[:5]:
        assert (tmp_path / "5" / name).read_bytes() == (tmp_path / "12" / name).read_bytes()


def test_which_weights(checkpoint, tmp_path):
    stored = {}
    for weights in ("ema", "ema_500", "raw"):
        path = f"{tmp_path}/{weights}.npz"
        files = OutputFiles(f"{tmp_path}/g.png", save_images=path)
        sampling.sample(checkpoint, n=2, weights=weights, sampler=SamplerOptions(steps=4), files=files)
        stored[weights] = np.load(path)["arr_0"]
    assert (stored["ema"] == stored["ema_500"]).all()
    assert (stored["ema"] != stored["raw"]).any()


def test_trajectories_run_from_noise_to_samples(checkpoint, tmp_path):
    strip, film = f"{tmp_path}/strip.png", f"{tmp_path}/film.gif"
    for path in (strip, film):
        files = OutputFiles(f"{tmp_path}/g.png", columns=12, trajectory=path)
        sampling.sample(checkpoint, n=12, sampler=SamplerOptions(steps=30, grid=UniformGrid()), files=files)
    picture = np.asarray(Image.open(strip).convert("L"))
    assert picture.shape == (sampling.STRIP_ROWS * 50 + 2, sampling.STRIP_COLUMNS * 50 + 2)
    noise = image_noise(image_seeds(0, range(1)), (1, 8, 8))
    for column, scale in ((0, 1.0), (sampling.STRIP_COLUMNS - 1, STD)):
        cell = picture[2 + 3 : 50 : 6, 2 + 3 + column * 50 : 50 + column * 50 : 6]  # the middle of each pixel
        assert np.abs(cell.astype(int) - to_uint8(scale * noise)[0, 0].numpy()).max() <= 2
    with Image.open(film) as animation:
        assert animation.n_frames == 31
        assert animation.info["loop"] == 0


def _named(*names):
    model = known_model((3, 8, 8), len(names))
    model.class_names = names
    return model


def test_classes_by_id_and_by_name():
    model = _named("cat", "dog")
    assert choose_classes(model, ["dog", "cat", "1"]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="no class 'cow' in this model; choose from 0 to 1, or cat, dog"):
        choose_classes(model, ["cat", "cow"])
    assert choose_classes(known_model((3, 8, 8), 2), ["1"]).tolist() == [1]
    with pytest.raises(ValueError, match=r"no class 'cat' in this model; choose from 0 to 1$"):
        choose_classes(known_model((3, 8, 8), 2), ["cat"])


def test_a_class_whose_name_is_a_number_goes_by_its_name():
    model = _named("1", "10", "2")  # folders, as they are sorted
    assert choose_classes(model, ["10", "2"]).tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"no class '0' in this model; choose from 1, 10, 2$"):
        choose_classes(model, ["0"])


def test_names_of_classes_travel_with_checkpoint_and_export(tmp_path):
    run_folder = save_run(tmp_path / "run", _named("cat", "dog"))
    export(str(run_folder), out=str(tmp_path / "export"))
    for source in (run_folder, tmp_path / "export"):
        sampling.sample(str(source), n=2, labels=["dog"], files=OutputFiles(str(tmp_path / "dog.png")))
        assert fmlit.load(source).class_names == ("cat", "dog")
    assert "0 cat, 1 dog" in (tmp_path / "export" / "README.md").read_text()


def test_vectors(tmp_path, capsys):
    folder = save_run(tmp_path / "run", known_model((1,), None), TwoPoints())
    points = f"{tmp_path}/points.npz"
    sampling.sample(str(folder), n=300, files=OutputFiles(f"{tmp_path}/plot.png", save_images=points))
    values = np.load(points)
    assert list(values) == ["arr_0"]
    assert np.allclose(values["arr_0"], STD * image_noise(image_seeds(0, range(300)), (1,)), rtol=0.02)  # 18 steps
    common = ("--checkpoint", folder, "--out", tmp_path / "x.png")
    assert "must end in .npz: this model makes vectors" in refusal(capsys, *common, "--save-images", tmp_path / "d")
    assert "makes vectors of shape (1,)" in refusal(capsys, *common, "--trajectory", tmp_path / "t.gif")
    assert "has no classes" in refusal(capsys, *common, "--labels", "0")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--labels", "4,12"), "there is no class '12' in this model; choose from 0 to 9"),
        (("--labels", "-1"), "there is no class '-1'"),
        (("--n", "0"), "n, batch_size and columns must be at least 1, got 0"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--solver", "hoin"), "solver: Expected one of ['euler', 'midpoint', 'heun', 'rk4', 'dopri5', 'ddim', "),
        (("--solver_options.order", "3"), "options: heun has no option 'order': it takes no options"),
        (("--solver", "unipc", "--solver_options.ordr", "3"), "unipc has no option 'ordr': choose from order"),
        (("--solver", "unipc", "--solver_options.order", "4"), "unipc order must be 1, 2 or 3, got 4"),
        (("--guidance_interval", "0.2,0.8"), "guidance_interval has no effect with guidance 1: set --guidance, too"),
        (("--guidance=2", "--guidance_interval=0.8,0.2"), "guidance_interval must satisfy 0 <= start < end <= 1"),
        (("--guidance=2", "--guidance_interval=0.8"), "guidance_interval takes two numbers, such as 0.2,0.8, got 0.8"),
        (("--sigma", "0.5"), "sigma is the noise of an SDE, and heun takes none"),
        (("--weights", "ema_7"), "no weights 'ema_7'; choose one of: raw, ema_500"),
        (("--out", "grid.jpg"), "grid.jpg must end in .png"),
        (("--trajectory", "film.mp4"), "film.mp4 must end in .png or .gif"),
        (("--seed", "-3"), "seed must lie in"),
        (("--device", "quantum"), "device 'quantum' cannot be used"),
        (("--label", "3"), "label: no such option; did you mean labels?"),
        (("--grid", "UniformGird"), "there is no class UniformGird; did you mean fmlit.UniformGrid?"),
    ],
)
def test_mistakes_are_named_in_one_line(checkpoint, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, "--checkpoint", checkpoint, *options)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_are_none(tmp_path, capsys):
    assert "there is no checkpoint" in refusal(capsys, "--checkpoint", tmp_path)
    assert "checkpoint: required" in refusal(capsys)
    (tmp_path / "text.ckpt").write_text("hello")
    assert "text.ckpt is damaged" in refusal(capsys, "--checkpoint", tmp_path / "text.ckpt")


def test_nothing_half_written_is_left(checkpoint, tmp_path, monkeypatch):
    def full_disk(folder, images, first=0):
        (folder / "000000.png").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    files = OutputFiles(f"{tmp_path}/g.png", save_images=f"{tmp_path}/images")
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "save_pngs", full_disk)
        with pytest.raises(OSError, match="No space left"):
            sampling.sample(checkpoint, n=2, sampler=SamplerOptions(steps=2), files=files)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").touch()
    with pytest.raises(ValueError, match="images exists already"):
        sampling.sample(checkpoint, n=2, sampler=SamplerOptions(steps=2), files=files)
    assert [path.name for path in tmp_path.rglob("*")] == ["images", "mine.png"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    (tmp_path / ".folder.partial").mkdir()
    (tmp_path / ".folder.partial" / "old").touch()
    with new_folder(tmp_path / "folder") as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--solver", "unipc", "--solver_options.order", "3"), "unipc4+order3"),
        (("--solver", "ipndm", "--solver-options.variable-step", "true"), "ipndm4+variable_step"),
        (("--solver", "dpmpp_3m", "--solver_options", "{corrected: true}"), "dpmpp3m4+corrected"),
        (("--solver", "dopri5", "--solver_options", '{"rtol": 1e-3, "atol": 1e-6}'), "dopri5+atol1e_06+rtol0.001"),
        (("--solver", "churn", "--solver_options.s_churn", "80"), "churn4+s_churn80"),
        (("--guidance", "2", "--guidance_interval", "0.2,0.8"), "heun4+cfg2_0.2to0.8"),
        (("--guidance", "2", "--guidance-interval", "[0.2, 0.8]"), "heun4+cfg2_0.2to0.8"),
    ],
)
def test_options_of_the_sampler_on_the_command_line(checkpoint, tmp_path, capsys, options, name):
    out = ("--checkpoint", checkpoint, "--n", "2", "--steps", "4", "--out", f"{tmp_path}/g.png")
    run(sampling.sample, [*out, *options])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sampler"] == name


def test_help_lists_the_solvers(capsys):
    with pytest.raises(SystemExit):
        run(sampling.sample, ["--help"])
    assert f"--solver {{{','.join(SOLVERS)}}}" in capsys.readouterr().out


def test_options_as_they_are_written(capsys):
    def command(steps: Integers = Integers([1]), save_images: bool = False, name: str = "") -> dict:
        """Says what it was given."""
        return {"steps": steps, "save_images": save_images, "name": name}

    for written, steps in (("5", [5]), ("5,10", [5, 10]), ("[5, 10]", [5, 10])):
        run(command, ["--steps", written, "--save-images", "--name=a-b"])
        assert json.loads(capsys.readouterr().out) == {"steps": steps, "save_images": True, "name": "a-b"}
    run(command, ["--save-images", "false"])
    assert json.loads(capsys.readouterr().out)["save_images"] is False
    with pytest.raises(SystemExit):
        run(command, ["--steps", "5,x"])
    assert "expected values such as 5,10,20" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(command, ["--help"])
    assert "Says what it was given." in capsys.readouterr().out


def test_the_sde_ends_in_the_same_law(checkpoint, tmp_path):
    path = f"{tmp_path}/images.npz"
    files = OutputFiles(f"{tmp_path}/g.png", save_images=path)
    sampling.sample(checkpoint, n=60, sampler=SamplerOptions("euler_maruyama", steps=60, sigma=1.0), files=files)
    pixels = torch.from_numpy(np.load(path)["arr_0"]).double()
    truth = to_uint8(STD * torch.randn(100_000, generator=torch.Generator().manual_seed(0))).double()  # clamped as well
    assert abs(pixels.mean() - truth.mean()) < 4 * truth.std() / pixels.numel() ** 0.5
    assert pixels.std() == pytest.approx(truth.std().item(), rel=0.05)  # 60 steps
