"""torch.compile: the same numbers under the same names, in training and for averages; plain PyTorch where it fails."""

import copy
import logging

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from fmlit.core.randomness import image_seeds
from fmlit.models.compilation import Execution, compile_net
from fmlit.sampling.samplers import ODESampler
from fmlit.storage.loading import load_model
from fmlit.training.averages import EMA
from fmlit.training.callbacks import Checkpoint
from tests.helpers.small_runs import digits_module, fit, tiny_mlp, tiny_unet, weights

pytestmark = pytest.mark.slow  # a C++ compiler at work

X, T, LABELS = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing is compiled yet, in memory or on the disk."""
    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


def test_a_compiled_network_gives_the_same_under_the_same_names():
    net = tiny_unet((1, 8, 8), 10, dropout=0.0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)  # the last layers start from zero
    compiled = copy.deepcopy(net)
    compile_net(compiled, "default")
    assert list(compiled.state_dict()) == list(net.state_dict())
    torch.testing.assert_close(compiled(X, T, LABELS), net(X, T, LABELS), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_copies_share_what_was_compiled():
    net = tiny_mlp((1, 8, 8), 10).eval()
    with torch.no_grad():
        for copied in (net, copy.deepcopy(net), copy.deepcopy(net)):
            compile_net(copied, "default")
            copied(X, T, LABELS)
    assert counters["stats"]["unique_graphs"] == 1


def test_training_sampling_and_checkpoints(tmp_path):
    plain, compiled = digits_module(), digits_module(execution=Execution(compile="default"))
    ema = EMA(half_lives=[100, 200])
    fit(plain, tmp_path / "plain", 4)
    fit(compiled, tmp_path / "compiled", 4, ema, Checkpoint(every=48))
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(compiled)[name], value, rtol=1e-3, atol=1e-5)
    saved = load_model(tmp_path / "compiled" / "checkpoints" / "last.ckpt", "ema_100")
    seeds, sampler = image_seeds(0, range(4)), ODESampler("euler", 3)
    drawn = sampler.sample(ema.model(compiled), seeds, LABELS)
    torch.testing.assert_close(sampler.sample(saved, seeds, LABELS), drawn, rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 2  # one of training, and one for both averages


def test_two_processes_with_a_static_graph(tmp_path):
    """As train.py launches them."""
    plain, spread = digits_module(), digits_module(execution=Execution(compile="default"))
    fit(plain, tmp_path, 3)
    strategy = DDPStrategy(start_method="spawn", static_graph=True, gradient_as_bucket_view=True)
    fit(spread, tmp_path, 3, devices=2, strategy=strategy)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(spread)[name], value, rtol=1e-3, atol=1e-5)


def test_cuda_graphs_do_not_go_with_accumulation(tmp_path):
    with pytest.raises(
        ValueError, match=r"model.execution.compile: reduce-overhead and trainer.accumulate_grad_batches do not"
    ):
        fit(digits_module(execution=Execution(compile="reduce-overhead")), tmp_path, 2, accumulate_grad_batches=2)


def test_what_a_graph_returns_is_copied():
    net = tiny_mlp((1, 8, 8), 10)
    compile_net(net, "reduce-overhead")
    same = torch.zeros(3)
    net._compiled_call_impl.compiled = lambda *_: same  # what replays of one graph write into
    first, second = net(X, T, LABELS), net(X, T, LABELS)
    assert len({x.data_ptr() for x in (same, first, second)}) == 3


def test_a_backward_pass_that_cannot_be_compiled(tmp_path, monkeypatch, caplog):
    """It is found in the first forward pass, where there is a way out."""

    def broken(*_, **__):
        raise RuntimeError("ptxas failed")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_backward", broken)
    plain, module = digits_module(), digits_module(execution=Execution(compile="default"))
    fit(plain, tmp_path, 2)
    with caplog.at_level(logging.WARNING, logger="fmlit"):
        fit(module, tmp_path, 2)
    assert "going on without it" in caplog.text
    assert all(torch.equal(weights(module)[name], value) for name, value in weights(plain).items())


@inductor.patch({"cpp.cxx": ("/nowhere/g++",)})
def test_without_a_compiler_training_goes_on(tmp_path, caplog):
    plain, broken = digits_module(), digits_module(execution=Execution(compile="default"))
    fit(plain, tmp_path, 2)
    with caplog.at_level(logging.WARNING, logger="fmlit"):
        fit(broken, tmp_path, 2)
    (warning,) = [record for record in caplog.records if record.name == "fmlit.models.compilation"]
    assert "going on without it" in warning.getMessage()
    assert "\n" not in warning.getMessage()
    assert all(torch.equal(weights(broken)[name], value) for name, value in weights(plain).items())


def test_a_mistake_of_the_network_stays_what_it_is(caplog):
    net = nn.Linear(3, 3)
    compile_net(net, "default")
    with pytest.raises(RuntimeError, match=r"shape|size"):
        net(torch.zeros(2, 5))
