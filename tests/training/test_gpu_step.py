"""A training step and a sampling run on a GPU that is not there.

Fake tensors have a shape, a type and a device, but no values: an operation that mixes devices raises as it would on a
GPU, and so does whatever asks the device for a number, before which a GPU's queue would have to run empty. Only the
backward pass is left out, which needs a device.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from fmlit import Digits
from fmlit.core import randomness
from fmlit.data.resident import ResidentDataset
from fmlit.flows.predictions import PreconditionedVelocity
from fmlit.flows.times import LogitNormalTime
from fmlit.models.compilation import Execution
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.samplers import ODESampler, SDESampler
from fmlit.training.averages import EMA
from fmlit.training.callbacks import TrainingLog
from fmlit.training.draws import TrainingDraws
from fmlit.training.modules import GenerativeModule, ScoreMatchingModule
from fmlit.training.optimizers import Muon
from tests.helpers.small_runs import digits_module, tiny_unet

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
FAST = {
    "optimizer": Muon(1e-3),
    "learned_loss_weight": True,
    "execution": Execution(channels_last=True),
    "prediction": PreconditionedVelocity(),
    "draws": TrainingDraws(LogitNormalTime(stratified=True)),
}
MODULES = {
    "flow matching": partial(digits_module, net=tiny_unet),
    "score matching": partial(digits_module, ScoreMatchingModule, net=tiny_unet),
    "all that is fast": partial(digits_module, net=partial(tiny_unet, scale_shift=True), **FAST),
}


def test_training_on_a_gpu_turns_off_the_attention_whose_gradients_can_be_nan(monkeypatch):
    module = digits_module(net=tiny_unet)
    module._trainer = trainer()
    for device, calls in ((CPU, []), (GPU, [False])):
        seen: list[bool] = []
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", seen.append)
        module._device = device
        module.on_fit_start()
        assert seen == calls


class FakeGPU(FakeTensorMode):
    """Tensors on the GPU are fake; those on the CPU are real."""

    def dispatch(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, FakeTensor | torch.device) and leaf != CPU for leaf in leaves):
            return super().dispatch(func, types, args, kwargs)
        return func(*args, **kwargs or {})


@pytest.fixture
def gpu(monkeypatch) -> FakeGPU:
    """Draws are without a generator: CUDA makes none where there is no device."""
    for name in ("rand", "randn", "randperm"):
        monkeypatch.setattr(torch, name, lambda *a, draw=getattr(torch, name), generator=None, **k: draw(*a, **k))
    monkeypatch.setattr(randomness, "training_generator", lambda *_: SimpleNamespace(device=GPU))
    monkeypatch.setattr(randomness, "seed_layers", lambda *_: None)
    return FakeGPU(allow_non_fake_inputs=True)


def move(module: nn.Module) -> None:
    """``module.to(GPU)``, which swaps weights in a way that fake ones do not know. Formats in memory are kept."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(fake(weight), weight.requires_grad)
        part._buffers |= {name: fake(buffer) for name, buffer in part._buffers.items() if buffer is not None}


def fake(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=GPU)


def trainer() -> SimpleNamespace:
    """What of a Trainer a step looks at."""
    loop = SimpleNamespace(_should_accumulate=lambda: False)
    numbers = {"world_size": 1, "global_rank": 0, "global_step": 0, "accumulate_grad_batches": 1}
    return SimpleNamespace(
        **numbers,
        is_global_zero=True,
        log_every_n_steps=50,
        callbacks=[],
        optimizers=[],
        lr_scheduler_configs=[],
        fit_loop=loop,
        datamodule=Digits(),
    )


def start(module: GenerativeModule) -> tuple[EMA, TrainingLog]:
    """What happens before the first step, on this device."""
    module._trainer = trainer()
    ema, log = EMA([40, 100]), TrainingLog()
    ema.setup(module.trainer, module, "fit")
    return ema, log


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_training_step_stays_on_the_device_and_never_waits_for_it(make, clip, gpu):
    module = make()
    ema, log = start(module)
    with gpu:
        for net in (module, *ema.copies.values()):
            move(net)
        module._device = GPU
        module.run.guard.to(GPU)
        data = Digits()
        data._resident = ResidentDataset(data.dataset("train"), GPU)
        rows = {"rows": torch.zeros(6, dtype=torch.int64, device=GPU), "flips": torch.zeros(6, device=GPU).bool()}
        optimizer = module.configure_optimizers()
        module.trainer.optimizers.append(optimizer)
        module.on_train_start()
        log.on_train_start(module.trainer, module)
        for step in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                outputs = module.training_step(data.on_after_batch_transfer(rows, 0), step)
            for parameter in module.parameters():
                parameter.grad = torch.empty_like(parameter)
            module.on_before_optimizer_step(optimizer)
            module.configure_gradient_clipping(optimizer, clip, "norm")
            optimizer.step()
            optimizer.zero_grad()
            module.trainer.global_step += 1
            ema.on_train_batch_end(module.trainer, module, outputs, rows, step)
            log.on_train_batch_end(module.trainer, module, outputs, rows, step)
        log._sum_up()
        assert outputs["loss"].device == log._sums.device == optimizer.found_inf.device == GPU
        assert {value.device for state in optimizer.state.values() for value in state.values()} == {GPU}
        with pytest.raises(DataDependentOutputException):  # what would have been raised
            outputs["loss"].item()


SAMPLERS = {
    "heun": ODESampler(method="heun", steps=3),
    "heun in bfloat16": ODESampler(method="heun", steps=3, precision="bfloat16"),
    "guided": ODESampler(method="dpmpp_2m", steps=3, guidance=2.0),
    "ipndm": ODESampler(method="ipndm", steps=3),
    "unipc": ODESampler(method="unipc", steps=3),
    "sde": SDESampler(steps=3),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_sampling_asks_the_device_once_at_the_end(sampler, make, gpu, monkeypatch):
    model: GenerativeModel = make().model
    asked = []
    monkeypatch.setattr("fmlit.solvers.ode._raise_unless_finite", lambda *_: asked.append(1))  # of all solvers
    with gpu:
        move(model)
        x = sampler.sample(model, torch.arange(4), torch.zeros(4, dtype=torch.int64))
        assert x.device == GPU
        assert x.dtype == torch.float32
    assert len(asked) == 1
