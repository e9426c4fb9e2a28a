"""What ``evaluate``, ``score`` and ``reference`` refuse: one line that names the mistake, and no number."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmlit import Digits, ImageFolder, TwoPoints
from fmlit.cli.evaluate import Sweep, evaluate
from fmlit.cli.options import Names, Numbers, run
from fmlit.cli.reference import reference
from fmlit.cli.score import score
from fmlit.cli.scoring_options import ScoringOptions
from fmlit.core.errors import StorageError
from fmlit.data.image_files import read_images, save_npz, save_pngs
from tests.helpers.known_model import known_model, save_run

pytestmark = pytest.mark.filterwarnings("ignore:a Fréchet distance from .. images in 64 dimensions")


def test_pictures_that_are_not_comparable_are_named(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    save_pngs(folder, torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    Image.new("RGB", (8, 9)).save(folder / "tall.png")
    with pytest.raises(ValueError, match=r"tall.png is 8x9 pixels, and the data 8x8"):
        read_images(str(folder), (1, 8, 8))
    Image.new("RGB", (8, 8), "red").save(folder / "tall.png")
    with pytest.raises(ValueError, match=r"tall.png is in color, and the data are gray"):
        read_images(str(folder), (1, 8, 8)).batch(range(3))
    assert read_images(str(folder), (3, 8, 8)).batch([2])[0][0, :, 0, 0].tolist() == [255, 0, 0]
    (folder / "tall.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read the picture .*tall.png"):
        read_images(str(folder), (1, 8, 8))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no pictures in"):
        read_images(str(empty), (1, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(2, 8, 8\) are read from an .npz"):
        read_images(str(folder), (2, 8, 8))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": np.zeros((3, 8, 8, 1), np.uint8)}, "not an .npz file with images in arr_0"),
        ({"arr_0": np.zeros((3, 8, 8, 1), np.float32)}, r"must be uint8 \(N, 8, 8, 1\) like the data, got float32"),
        ({"arr_0": np.zeros((3, 1, 8, 8), np.uint8)}, r"like the data, got uint8 \(3, 1, 8, 8\)"),
        ({"arr_0": np.array([None])}, "not an .npz file with images"),  # a pickle, which is not opened
    ],
)
def test_arrays_that_are_no_images(arrays, said, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        read_images(str(tmp_path / "x.npz"), (1, 8, 8))


def refusal(capsys, *args: object, command: Callable = evaluate) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(command, [str(arg) for arg in args])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--metrics is", "unknown metric 'is': choose from fid, kid"),
        ("--metrics bpd --steps 5", "--steps has no meaning with --metrics bpd"),
        ("--metrics bpd --neighbors 5", "--neighbors has no meaning with --metrics bpd"),
        ("--images x", "images: no such option"),
        ("--n 1", "n must be at least 2, got 1"),
        ("--batch-size 0", "batch_size must be at least 1"),
        ("--neighbors -1", "neighbors must be a number of samples"),
        ("--splits train,validation", "split must be one of train, test, got 'validation'"),
        ("--solver heun,hoin", "unknown solver 'hoin'"),
        ("--steps 5,0", "steps must be at least 1, got 0"),
        ("--steps 5,ten", "expected values such as 5,10,20"),
        ("--features pixel", "features: Expected one of ['inception', 'pixels']"),
        ("--weights ema_9", "no weights 'ema_9'"),
        ("--data Digits --data.size 3", "data.size: no such option"),
    ],
)
def test_contradictions_are_named_in_one_line(checkpoint, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, "--checkpoint", checkpoint, *options.split())


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        (score, "--images x --guidance 2", "guidance: no such option"),
        (score, "--images x --metrics fid,class", "metric class needs a model, and pictures come without one"),
        (score, "--images x --metrics fid,fit", "unknown metric 'fit': choose from fid, kid, precision, recall"),
        (score, "--images nowhere", "there is no folder nowhere"),
        (score, "--images nowhere.npz", "No such file or directory: 'nowhere.npz'"),
        (score, "", "images: required, and not given"),
        (reference, "--n 50000", "n: no such option"),
        (reference, "--metrics fid", "metrics: no such option"),
        (reference, "--splits validation", "split must be one of train, test, got 'validation'"),
    ],
)
def test_commands_without_a_model_have_no_options_of_one(
    command, options, said, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, "--checkpoint", checkpoint, *options.split(), command=command)
    assert not (tmp_path / "data").exists()


def test_models_and_data_that_do_not_fit(tmp_path, checkpoint, options, capsys):
    vectors = str(save_run(tmp_path / "vectors", known_model((1,), None), TwoPoints()))
    with pytest.raises(ValueError, match="only images can be evaluated, and TwoPoints holds vectors"):
        evaluate(vectors, **options)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"model makes images of shape \(1, 8, 8\), and ImageFolder holds \(3, 9, 9\)"):
        evaluate(
            checkpoint, out=options["out"], scoring=replace(options["scoring"], data=ImageFolder(str(tmp_path), 9))
        )
    letters = known_model()
    letters.class_names = tuple("abcdefghij")
    with pytest.raises(ValueError, match=r"the model's classes are \[a, b, .*, and those of the data \[0, 1, "):
        evaluate(str(save_run(tmp_path / "letters", letters)), **options)
    unconditional = str(save_run(tmp_path / "unconditional", known_model(num_classes=None)))
    with pytest.raises(ValueError, match="needs a model of the data's 10 classes, and this one has none"):
        evaluate(unconditional, metrics=Names(["class"]), **options)
    with pytest.raises(ValueError, match=r"guidance 2 needs a class-conditional model"):
        evaluate(unconditional, sweep=Sweep(guidance=Numbers([2.0])), **options)
    with pytest.raises(ValueError, match="ImageFolder has no test pictures"):
        reference(scoring=replace(options["scoring"], data=ImageFolder(str(tmp_path), 8), splits=Names(["test"])))
    assert "checkpoint: required, and not given" in refusal(capsys)
    assert "give --data, or the --checkpoint" in refusal(capsys, command=reference)
    assert "give --data, or the --checkpoint" in refusal(capsys, "--images", tmp_path, command=score)


def test_a_folder_that_cannot_be_written(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        evaluate(
            checkpoint, n=4, out=str(tmp_path / "file" / "out"), scoring=ScoringOptions(cache=str(tmp_path / "cache"))
        )


def test_refused_pictures_leave_no_folder(options, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 8, 8, 1), np.float32))
    assert "uint8" in refusal(
        capsys, "--images", tmp_path / "x.npz", "--data", "Digits", *flags(options), command=score
    )
    assert not Path(options["out"]).exists()


def flags(options: dict) -> list[object]:
    scoring = options["scoring"]
    return ["--out", options["out"], "--cache", scoring.cache, "--batch-size", scoring.batch_size]


def model_with_bias(tmp_path, bias: float) -> str:
    model = known_model()
    torch.nn.init.constant_(model.net.outputs[-1].bias, bias)
    return str(save_run(tmp_path / "run", model))


def test_a_model_that_makes_nan_has_no_score(tmp_path, options, capsys):
    line = refusal(capsys, "--checkpoint", model_with_bias(tmp_path, torch.nan), "--n", 70, *flags(options))
    assert "NaN or infinite values" in line
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_model_whose_samples_have_another_range_is_warned_of(tmp_path, options):
    with pytest.warns(UserWarning, match="of the samples' values lie beyond"):
        evaluate(model_with_bias(tmp_path, 40.0), n=70, metrics=Names(["fid"]), **options)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_inception_weights_that_are_something_else(content, checkpoint, tmp_path, options, monkeypatch, capsys):
    (tmp_path / "weights.pth").write_bytes(content)
    monkeypatch.setenv("FMLIT_INCEPTION", str(tmp_path / "weights.pth"))
    line = refusal(capsys, "--checkpoint", checkpoint, "--features", "inception", *flags(options))
    assert f"{tmp_path / 'weights.pth'} is not a weights file" in line


def test_statistics_of_something_else_in_the_cache(checkpoint, options, tmp_path, capsys):
    scoring = replace(options["scoring"], data=Digits())
    (train,) = reference(scoring=scoring)["references"]
    (test,) = reference(scoring=replace(scoring, splits=Names(["test"])))["references"]
    Path(test).replace(train)
    line = refusal(capsys, "--checkpoint", checkpoint, "--n", 70, *flags(options))
    assert f"{train} holds statistics of Identity" in line
    assert line.endswith("delete it")


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_pictures(n, options, tmp_path, capsys):
    with open(tmp_path / "x.npz", "wb") as file:
        save_npz(file, torch.zeros(n, 1, 8, 8, dtype=torch.uint8))
    line = refusal(capsys, "--images", tmp_path / "x.npz", "--data", "Digits", *flags(options), command=score)
    assert f"at least 2 generated images, got {n}" in line


def test_a_report_without_room_is_no_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint = save_run(tmp_path / "run", known_model())
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(StorageError, match="No space left on device"):
        evaluate(str(checkpoint), n=4, sweep=Sweep(steps=[2]))
