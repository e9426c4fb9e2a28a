"""Models of checkpoints: which weights they get, and what is said of files that do not fit."""

import pytest
import torch

import fmlit
from fmlit.core.errors import UserError
from fmlit.flows.paths import CosinePath
from fmlit.flows.predictions import Velocity
from fmlit.models.generative_model import GenerativeModel
from fmlit.models.mlp import MLP
from fmlit.storage import exports
from fmlit.storage.checkpoints import AtomicCheckpointIO
from fmlit.storage.descriptions import describe
from fmlit.storage.loading import find_model, training_data, weights_of


def model(seed=0, width=8):
    torch.manual_seed(seed)
    net = MLP((2,), num_classes=3, width=width, depth=1)
    return GenerativeModel(net, CosinePath(), Velocity(), (2,), 3)


def save_model(path, raw, averaged, **changes):
    """What a training run writes."""
    content = {
        "global_step": 1,
        "state_dict": {f"model.net.{k}": v for k, v in raw.net.state_dict().items()} | {"metric": torch.ones(1)},
        "ema": {name: m.net.state_dict() for name, m in averaged.items()},
        "model_description": describe(raw),
    }
    AtomicCheckpointIO().save_checkpoint(content | changes, path)
    return path


def same_weights(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_model_comes_back_with_the_weights_that_were_asked_for(tmp_path):
    raw, slow, fast = model(1).train(), model(2), model(3)
    path = save_model(tmp_path / "last.ckpt", raw, {"slow": slow, "fast": fast})
    for weights, expected in {"raw": raw, "ema": slow, "slow": slow, "fast": fast}.items():
        loaded = fmlit.load(path, weights)
        assert same_weights(loaded, expected), weights
        assert not loaded.training
        assert loaded.path == CosinePath()
    x, t, labels = torch.randn(4, 2), torch.rand(4), torch.tensor([0, 1, 2, 3])
    assert torch.equal(fmlit.load(path).velocity(x, t, labels), slow.eval().velocity(x, t, labels))


def test_a_copy_named_ema_is_the_ema(tmp_path):
    path = save_model(tmp_path / "last.ckpt", model(1), {"other": model(2), "ema": model(3)})
    assert same_weights(fmlit.load(path), model(3))


def test_loaded_model_does_not_depend_on_the_file(tmp_path):
    path = save_model(tmp_path / "last.ckpt", model(1), {"ema": model(2)})
    loaded = fmlit.load(path)
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
        ({"ema": {"slow": dict.fromkeys(model().net.state_dict(), 1)}}, "ema", ["is a int, not a tensor"]),
        ({"ema": ["slow"]}, "slow", ["list"]),
        ({"model_description": {"class_path": "os.system"}}, "ema", ["'os.system' is refused", "--trust"]),
        ({"model_description": describe(model().net)}, "ema", ["MLP, not a GenerativeModel"]),
        ({"model_description": "MLP"}, "ema", ["a description is a dict"]),
    ],
)
def test_unfit_checkpoint_says_why_in_one_line(tmp_path, changes, weights, words):
    path = save_model(tmp_path / "last.ckpt", model(1), {"slow": model(2)}, **changes)
    with pytest.raises(ValueError, match=r"last\.ckpt") as error:
        fmlit.load(path, weights)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_checkpoint_without_description(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"state_dict": model().state_dict()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="does not describe its model"):
        fmlit.load(tmp_path / "last.ckpt")


def test_runs_checkpoints_and_exports_are_loaded_alike(tmp_path, monkeypatch):
    run, trained = tmp_path / "run", model(2)
    save_model(run / "checkpoints" / "last.ckpt", model(1), {"slow": trained})
    exports.save(trained, new(tmp_path / "plain"))
    exports.save(trained, new(tmp_path / "slow"), {"weights": "slow"})
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = [run, run / "checkpoints" / "last.ckpt", tmp_path / "plain", str(tmp_path / "slow"), "~/run", "~/slow"]
    for source in sources:
        loaded = fmlit.load(source)
        assert same_weights(loaded, trained), source
        assert not loaded.training
    assert same_weights(fmlit.load(tmp_path / "slow", "slow"), trained)
    assert weights_of(tmp_path / "slow", "ema") == "slow"


def new(folder):
    folder.mkdir()
    return folder


def test_an_export_has_the_weights_that_it_states_and_no_data(tmp_path):
    exports.save(model(), tmp_path, {"weights": "slow"})
    with pytest.raises(UserError, match="holds the weights 'slow' and no 'raw'; leave weights out"):
        fmlit.load(tmp_path, "raw")
    with pytest.raises(UserError, match="does not name its training data; give them by --data"):
        training_data(tmp_path)


@pytest.mark.parametrize(("option", "way"), [(None, "give a .ckpt file"), ("guide", "give --guide a .ckpt file")])
def test_a_path_without_a_model_is_named_with_what_to_give(tmp_path, option, way):
    for path, missing in {tmp_path: tmp_path / "checkpoints" / "last.ckpt", tmp_path / "no": tmp_path / "no"}.items():
        with pytest.raises(UserError) as error:
            find_model(path, option)
        assert str(error.value).startswith(f"there is no checkpoint {missing}: {way}, the folder of a run, or")
        with pytest.raises(UserError, match="there is no checkpoint"):
            fmlit.load(path)
