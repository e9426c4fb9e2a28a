"""The network of a module: a factory, or one that is built already, as in a notebook."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fmlit
from fmlit.core.errors import UserError
from fmlit.training.networks import build_network
from tests.helpers.small_runs import fit, same, tiny_mlp, tiny_unet, weights

SHAPE = (1, 8, 8)


class Plain(nn.Linear):
    """A network that says nothing about the data."""

    def __init__(self):
        super().__init__(64, 64)

    def forward(self, x, t, labels=None):
        return super().forward(x.flatten(1)).view_as(x)


@pytest.mark.parametrize("make", [fmlit.FlowMatchingModule, fmlit.ScoreMatchingModule])
@pytest.mark.parametrize("num_classes", [None, 10])
@pytest.mark.filterwarnings("ignore")
def test_a_network_that_is_built_already_trains_with_a_plain_trainer(make, num_classes, tmp_path):
    net = tiny_mlp(SHAPE, num_classes)
    module = make(net=net)
    assert module.model.net is net
    assert (module.model.shape, module.model.num_classes) == (SHAPE, num_classes)
    before = weights(module)
    trainer = pl.Trainer(max_steps=3, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False)
    trainer.fit(module, fmlit.Digits(batch_size=12))
    assert module.images_seen == 36
    assert not same(before, weights(module))


def test_it_is_the_module_that_the_factory_makes():
    torch.manual_seed(0)
    made = fmlit.FlowMatchingModule(tiny_mlp, SHAPE, 10, conditional=True)
    torch.manual_seed(0)
    given = fmlit.FlowMatchingModule(tiny_mlp(SHAPE, 10))
    assert same(made.state_dict(), given.state_dict())
    assert (made.model.shape, made.model.num_classes) == (given.model.shape, given.model.num_classes)


def test_a_network_without_attributes_needs_the_shape():
    assert build_network(Plain(), SHAPE, None, False)[1:] == (SHAPE, None)
    assert build_network(Plain(), SHAPE, 10, False)[1:] == (SHAPE, None)
    assert build_network(Plain(), SHAPE, 10, True)[1:] == (SHAPE, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (tiny_mlp, None, None, False),
            r"shape: give the shape of one data point, as in shape=\(3, 32, 32\), or a net",
        ),
        ((Plain(), None, None, False), "shape: Plain has no attribute shape; give the shape of one data point"),
        ((tiny_mlp((2,)), (3,), None, False), r"shape: MLP was built for \(2,\), not for \(3,\); leave shape out"),
        ((tiny_mlp((2,)), None, 10, True), "conditional: MLP was built without classes; give it num_classes"),
        ((tiny_mlp((2,), 3), None, 4, True), "num_classes: MLP was built for 3, not for 4; leave num_classes out"),
        ((Plain(), SHAPE, None, True), "conditional: Plain was built without classes"),
        ((tiny_mlp, (2,), None, True), "conditional: true needs data with classes"),
    ],
)
def test_what_does_not_fit_is_named_with_the_way_out(arguments, message):
    with pytest.raises(UserError, match=message):
        build_network(*arguments)


def test_a_network_inside_torch_compile_is_refused():
    """It would save its weights under other names than the network itself."""
    compiled = torch.compile(tiny_mlp((2,)), backend="eager")
    with pytest.raises(UserError, match=r"the network itself, .* execution=fmlit.Execution\(compile='default'\)"):
        fmlit.FlowMatchingModule(compiled)


def test_data_that_do_not_fit_are_refused_before_the_first_step(tmp_path):
    for net, words in (
        (tiny_mlp((1, 16, 16)), r"the network is for data of shape \(1, 16, 16\), and the data has \(1, 8, 8\)"),
        (tiny_unet((1, 8, 8), 5), "the network has 5 classes, and the data 10"),
    ):
        with pytest.raises(UserError, match=words):
            fit(fmlit.FlowMatchingModule(net=net), tmp_path, 1)


def test_batches_of_plain_loaders_are_refused_by_what_they_lack(tmp_path):
    loader = DataLoader(TensorDataset(torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)), batch_size=4)
    with pytest.raises(UserError, match=r"a batch must be a dict of data .*, got list"):
        fit(fmlit.FlowMatchingModule(net=tiny_unet((1, 8, 8))), tmp_path, 1, data=loader)
