import json
import sys
from typing import Any

import pytest
import torch
from torch import nn

from fmlit.flows.paths import CondOTPath, CosinePath, PolynomialPath, VPPath
from fmlit.flows.predictions import Noise, PreconditionedVelocity, Score, Velocity
from fmlit.models.generative_model import GenerativeModel
from fmlit.models.mlp import MLP
from fmlit.storage.descriptions import build, describe


class Keeper(nn.Module):
    """A network outside fmlit that keeps its arguments."""

    def __init__(self, options=None, sizes=(), inner=None, flag=False):
        super().__init__()
        self.options, self.sizes, self.inner, self.flag = options, sizes, inner, flag
        self.weight = nn.Parameter(torch.zeros(2))


class Forgetful(nn.Module):
    def __init__(self, width, depth=2):
        super().__init__()
        self.depth = depth


class Variadic(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.sizes = sizes


def model():
    return GenerativeModel(MLP((2,), num_classes=3, width=8, depth=1), VPPath(rate_max=15.0), Noise(), (2,), 3)


@pytest.mark.parametrize(
    "obj", [CondOTPath(), CosinePath(), PolynomialPath(3.0), VPPath(0.2, 9.0), Velocity(), Score()]
)
def test_frozen_dataclasses_come_back_equal(obj):
    assert build(describe(obj)) == obj


def test_description_of_a_model_is_what_the_docs_say():
    assert describe(model()) == {
        "class_path": "fmlit.GenerativeModel",
        "init_args": {
            "net": {"class_path": "fmlit.MLP", "init_args": {"shape": (2,), "num_classes": 3, "width": 8, "depth": 1}},
            "path": {"class_path": "fmlit.VPPath", "init_args": {"rate_min": 0.1, "rate_max": 15.0}},
            "prediction": {"class_path": "fmlit.Noise", "init_args": {}},
            "shape": (2,),
            "num_classes": 3,
            "coupled": False,
            "class_names": None,
        },
    }


def test_model_comes_back_also_through_json():
    described = describe(model())
    for description in (described, json.loads(json.dumps(described))):
        again = build(description)
        assert describe(again) == described
        again.net.load_state_dict(model().net.state_dict())  # the same shapes and names
        assert again.path == VPPath(rate_max=15.0)
        assert again.shape == (2,)


def test_plain_data_keeps_types_and_nesting():
    keeper = Keeper({"a": [1, 2.5, None], "b": {"c": (True, "x")}}, torch.Size([3, 4]), [CosinePath(), Keeper()])
    described = describe(keeper)
    assert type(described["init_args"]["sizes"]) is tuple
    again = build(described, trust=[__name__])
    assert again.options == keeper.options
    assert again.inner[0] == CosinePath()
    assert isinstance(again.inner[1], Keeper)
    assert describe(again) == described


def test_description_loads_with_weights_only(tmp_path):
    torch.save(describe(model()), tmp_path / "description")
    assert torch.load(tmp_path / "description", weights_only=True) == describe(model())


def test_unet2d_is_described_by_its_config():
    from diffusers import UNet2DModel

    net: Any = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
        attention_head_dim=4,
    )
    described = json.loads(json.dumps(describe(net)))
    assert described["class_path"] == "diffusers.UNet2DModel"
    assert not [name for name in described["init_args"] if name.startswith("_")]
    again = build(described)
    assert isinstance(again, type(net))
    again.load_state_dict(net.state_dict())


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        (Forgetful(3), ["Forgetful", "'width'", "attribute of the same name"]),
        (Variadic(3), ["Variadic", "'sizes'"]),
        (Keeper(options=object()), ["Keeper.options", "builtins.object"]),
        (Keeper(options=torch.tensor(1.0)), ["Keeper.options", "torch.Tensor"]),
        (Keeper(options={1: 2}), ["Keeper.options", "dict"]),
        (Keeper(options={"class_path": "x"}), ["Keeper.options", "dict"]),
        (Keeper(inner=[Forgetful(1)]), ["Forgetful", "'width'"]),
        (nn.Linear(2, 3), ["Linear"]),
        ({"not": "a model"}, ["networks, paths, predictions", "dict"]),
    ],
)
def test_what_cannot_be_described_is_named(obj, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        describe(obj)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_subclass_of_float_is_refused_since_weights_only_would_refuse_it():
    import numpy as np

    with pytest.raises(ValueError, match=r"Keeper.options is a numpy.float64"):
        describe(Keeper(options=np.float64(0.5)))


def test_local_class_is_refused():
    class Local(nn.Module):
        pass

    with pytest.raises(ValueError, match="top level of a module"):
        describe(Local())


FOREIGN = [
    "os.system",
    "builtins.eval",
    "fmlit.storage.checkpoints.os.system",
    "fmlit.storage.descriptions.importlib.import_module",
    "fmlit.storage.descriptions.nn.Linear",
    "fmlit.storage.descriptions.build",  # in fmlit, but not a class
    "fmlit.storage.descriptions.nn",
    "fmlit.storage.run_folder.Path",  # a class in fmlit, but not of it
    "fmlit.flows.paths.VPPath",  # a class of fmlit by another name than its public one
    "fmlit.UniformTime",  # a class of fmlit, but not a part of models
    "fmlit.nowhere.Net",
    "fmlit.models.unet.Nowhere",
    "fmlit",
    "fmlit.",
    "fmlit..networks.MLP",
    "fmlitx.networks.MLP",
    "",
    "torch.nn.Linear",
    "diffusers.UNet1DModel",
    "diffusers.UNet2DModel.from_pretrained",
    "../fmlit.MLP",
]


@pytest.mark.parametrize("class_path", FOREIGN)
@pytest.mark.parametrize("nested", [False, True])
def test_foreign_class_is_refused_by_name(class_path, nested, monkeypatch):
    evil = {"class_path": class_path, "init_args": {"command": "true"}}
    description = describe(model()) if nested else evil
    if nested:
        description["init_args"]["shape"] = [{"deep": (evil,)}]
    monkeypatch.setattr(MLP, "__init__", lambda *_, **__: pytest.fail("built before all classes were checked"))
    with pytest.raises(ValueError, match="--trust") as error:
        build(description)
    assert repr(class_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def foreign_package(tmp_path, monkeypatch):
    """A package outside fmlit whose import leaves a trace."""
    (tmp_path / "foreignnets.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\n"
        "import os\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, width: int = 1):\n"
        "        super().__init__()\n"
        "        self.width = width\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "imported"
    sys.modules.pop("foreignnets", None)


def test_foreign_package_is_imported_only_when_trusted(foreign_package):
    net = {"class_path": "foreignnets.Net", "init_args": {"width": 4}}
    for description in (net, {"class_path": "fmlit.VPPath", "init_args": {"rate_min": net}}):
        with pytest.raises(ValueError, match=r"'foreignnets.Net' is refused"):
            build(description, trust=["foreign"])
    assert not foreign_package.exists()
    assert build(net, trust=["foreignnets"]).width == 4
    assert foreign_package.exists()


def test_trust_reaches_no_further_than_the_package(foreign_package):
    with pytest.raises(ValueError, match=r"foreignnets.os.system cannot be imported"):
        build({"class_path": "foreignnets.os.system"}, trust=["foreignnets"])
    with pytest.raises(ValueError, match=r"'foreignnets.nn' is refused"):
        build({"class_path": "foreignnets.nn"}, trust=["foreignnets"])


def test_nothing_is_imported_if_one_name_is_bad(foreign_package):
    good = {"class_path": "foreignnets.Net", "init_args": {"width": {"class_path": "os.system"}}}
    with pytest.raises(ValueError, match=r"'os.system' is refused"):
        build(good, trust=["foreignnets"])
    assert not foreign_package.exists()


@pytest.mark.parametrize(
    ("description", "match"),
    [
        (None, "a description is a dict"),
        ({"init_args": {}}, "a description is a dict"),
        ({"class_path": "fmlit.VPPath", "init_args": [1]}, "init_args, a dict"),
        ({"class_path": 3}, "class_path, a str"),
        ({"class_path": "fmlit.VPPath", "more": 1}, "class_path, a str"),
        ({"class_path": "fmlit.VPPath", "init_args": {3: 1}}, "must be str"),
        ({"class_path": "fmlit.VPPath", "init_args": {"rate_min": torch.ones(1)}}, "plain data only"),
        ({"class_path": "fmlit.VPPath", "init_args": {"rate": 1.0}}, r"VPPath cannot be built.*'rate'"),
        ({"class_path": "fmlit.VPPath", "init_args": {"rate_min": -1.0}}, "VPPath cannot be built.*-1.0"),
        ({"class_path": "fmlit.VPPath", "init_args": {"class_path": "os.system"}}, "VPPath cannot be built"),
        ({"class_path": "fmlit.GaussianPath"}, "GaussianPath cannot be built.*abstract"),
        ({"class_path": "fmlit.MLP", "init_args": {"shape": [2], "width": "wide"}}, "MLP cannot be built"),
    ],
)
def test_malformed_description(description, match):
    with pytest.raises(ValueError, match=match) as error:
        build(description)
    assert "\n" not in str(error.value)


def test_missing_arguments_take_the_defaults_of_today():
    assert build({"class_path": "fmlit.PreconditionedVelocity"}) == PreconditionedVelocity()
