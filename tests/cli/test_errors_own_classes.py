"""Classes of the user's own: what goes wrong in them keeps its traceback, and a UserError gets its key."""

import sys
from pathlib import Path

import pytest
import yaml

from fmlit.core.errors import UserError
from tests.helpers.tiny_cli import recipe, train

ERRORS = ["ValueError", "TypeError", "OSError", "AttributeError", "ImportError", "AssertionError", "RuntimeError"]

OWN = """
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
import fmlit
from torch.utils.data import Dataset

class Net(fmlit.MLP):
    def __init__(self, shape, num_classes, width: int = 8, depth: int = 1, fails: str = "at all", kind: str = ""):
        super().__init__(shape, num_classes, width, depth)
        self.fails, self.kind = fails, kind
        if fails == "built":
            raise eval(kind)("mine")

    def forward(self, x, t, labels=None):
        if self.fails == "called":
            raise eval(self.kind)("mine")
        return super().forward(x, t, labels)

class Callback(pl.Callback):
    def __init__(self, kind: str = "", name: str = ""):
        if kind:
            raise eval(kind)("mine")

class Logger(CSVLogger):
    def __init__(self, kind: str):
        raise eval(kind)("mine")

class Path(fmlit.CondOTPath):
    def __init__(self, kind: str):
        raise eval(kind)("mine")

class Items(Dataset):
    def __init__(self, kind: str):
        self.kind = kind

    def __len__(self):
        return 64

    def __getitem__(self, index):
        raise eval(self.kind)("mine")

class Data(fmlit.DataModule):
    shape = (1,)

    def __init__(self, kind: str, num_workers: int = 0, batch_size: int = 16, seed: int = 0):
        super().__init__(batch_size, seed)
        self.kind, self.num_workers = kind, num_workers

    def load(self, split):
        return Items(self.kind)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Items(self.kind), self.batch_size, num_workers=self.num_workers)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_classes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_classes", raising=False)


def options(place: str, kind: str) -> list[str]:
    """What makes one of the classes raise an error of that kind when it is built."""
    return {
        "net": ["--model.net=own_classes.Net", "--model.net.fails=built", f"--model.net.kind={kind}"],
        "path": ["--model.path=own_classes.Path", f"--model.path.kind={kind}"],
        "callbacks": ["--trainer.callbacks=own_classes.Callback", f"--trainer.callbacks.kind={kind}"],
        "logger": ["--trainer.logger=own_classes.Logger", f"--trainer.logger.kind={kind}"],
    }[place]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("place", ["net", "path", "callbacks", "logger"])
def test_an_error_of_a_constructor_keeps_its_traceback(tmp_path: Path, place: str, kind: str) -> None:
    with pytest.raises(Exception, match=r"^mine$") as error:
        train(tmp_path, *options(place, kind))
    assert type(error.value).__name__ == kind
    assert error.traceback[-1].path.name == "own_classes.py"
    assert error.value.__context__ is None  # nothing that jsonargparse made of it stands above it


@pytest.mark.parametrize(
    ("place", "key"),
    [("net", "model.net"), ("path", "model.path"), ("callbacks", "trainer.callbacks"), ("logger", "trainer.logger")],
)
def test_a_user_error_of_a_constructor_gets_its_key(tmp_path: Path, place: str, key: str) -> None:
    assert train(tmp_path, *options(place, "fmlit.UserError")).error == f"{key}: mine"


def test_the_second_callback_of_a_list_may_fail(tmp_path: Path) -> None:
    entries = "[{class_path: own_classes.Callback}, {class_path: own_classes.Callback, init_args: {kind: OSError}}]"
    with pytest.raises(OSError, match=r"^mine$"):
        train(tmp_path, f"--trainer.callbacks={entries}")


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if kind != "RuntimeError"])
def test_an_error_of_a_running_network_keeps_its_traceback(tmp_path: Path, kind: str) -> None:
    with pytest.raises(Exception, match=r"^mine$") as error:
        train(tmp_path, "--model.net=own_classes.Net", "--model.net.fails=called", f"--model.net.kind={kind}")
    assert type(error.value).__name__ == kind


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_a_data_set_keep_their_nature(tmp_path: Path, workers: int) -> None:
    data = ("--data=own_classes.Data", f"--data.num_workers={workers}")
    path = recipe(tmp_path, "  init_args: {samples: 64, batch_size: 16}\n", "", "own.yaml")
    for kind in ("ValueError", "OSError"):
        with pytest.raises(Exception, match=f"^mine$|{kind}: mine") as error:
            train(tmp_path, "--config", str(path), *data, f"--data.kind={kind}")
        assert type(error.value).__name__ == kind
    assert train(tmp_path, "--config", str(path), *data, "--data.kind=fmlit.UserError").error == "mine"
    assert train(tmp_path, "--config", str(path), *data, "--data.kind=FileNotFoundError").error == "mine"


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        ("import nowhere_to_be_found", ImportError, "No module named 'nowhere_to_be_found'"),
        ("from torch import nothing", ImportError, "cannot import name 'nothing'"),
        ("import torch; torch.nothing", AttributeError, "has no attribute 'nothing'"),
        ("raise ValueError('mine')", ValueError, "^mine$"),
    ],
)
@pytest.mark.parametrize("key", ["model.net", "model.path", "data", "trainer.callbacks", "trainer.logger"])
def test_an_error_of_the_module_itself_keeps_its_traceback(
    tmp_path: Path, key: str, line: str, kind: type[Exception], said: str
) -> None:
    (tmp_path / "own_classes.py").write_text(line)
    with pytest.raises(kind, match=said):
        train(tmp_path, f"--{key}=own_classes.Net")


@pytest.mark.parametrize("line", ["import nowhere_to_be_found", "raise ImportError('nowhere_to_be_found')"])
def test_so_does_an_error_of_a_module_that_a_recipe_names(tmp_path: Path, line: str) -> None:
    (tmp_path / "own_classes.py").write_text(line)
    path = recipe(tmp_path, "fmlit.MLP", "own_classes.Net", "own.yaml")
    with pytest.raises(ImportError, match="nowhere_to_be_found"):
        train(tmp_path, "--config", str(path))


@pytest.mark.parametrize("name", ["own_classes.Nett", "own_class.Net"])
def test_a_class_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    error = train(tmp_path, f"--model.net={name}").error
    assert error.startswith(("model.net: there is no class Nett", "model.net: No module named 'own_class'"))


def test_the_keys_of_objects_stay_out_of_what_is_written(tmp_path: Path) -> None:
    callbacks = "[{class_path: own_classes.Callback}, {class_path: own_classes.Callback, init_args: {name: a}}]"
    assert train(tmp_path, f"--trainer.callbacks={callbacks}").code == 0
    text = (tmp_path / "runs" / "tiny" / "config.yaml").read_text()
    assert "dict_kwargs" not in text
    assert "__key__" not in text
    assert [entry["init_args"]["name"] for entry in yaml.safe_load(text)["trainer"]["callbacks"]] == ["", "a"]


def test_the_message_of_a_worker_is_the_one_of_the_error() -> None:
    text = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
    assert str(UserError(f"{text}fmlit.core.errors.UserError: b.png: broken\n")) == "b.png: broken"
    assert str(UserError("a UserError: plain")) == "a UserError: plain"


ABSTRACT = """
import fmlit

class Half(fmlit.GaussianPath):
    def __init__(self, power: float = 1.0):
        self.power = power

    def alpha(self, t):
        return t

class Data(fmlit.DataModule):
    pass
"""


@pytest.mark.parametrize(
    ("key", "cls", "lacks"),
    [("model.path", "Half", "alpha_dot, beta, beta_dot, time_of_sigma"), ("data", "Data", "load")],
)
def test_an_abstract_class_of_ones_own_says_what_it_lacks(tmp_path, monkeypatch, key, cls, lacks):
    (tmp_path / "unfinished.py").write_text(ABSTRACT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "unfinished", raising=False)
    error = train(tmp_path, f"--{key}=unfinished.{cls}").error
    assert error == f"{key}: unfinished.{cls} is abstract: it lacks {lacks}"
