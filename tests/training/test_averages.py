from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

import fmlit
from fmlit.metrics import NetworkFeatures
from fmlit.models.mlp import MLP
from fmlit.sampling.samplers import ODESampler
from fmlit.storage.checkpoints import load
from fmlit.storage.run_folder import RunFolder
from fmlit.training.averages import EMA
from fmlit.training.callbacks import Checkpoint, QualityCurve, SampleGrid
from tests.helpers.small_runs import digits_module, fit, same, tiny_unet, weights

SLOW = 10**9  # a half-life that only the ramp keeps from holding on to the beginning


class Interrupting(ODESampler):
    """Does something to the trainer when it is in the middle of sampling."""

    def __init__(self, interrupt) -> None:
        super().__init__("euler", 4)
        self.interrupt = interrupt

    def integrate(self, *arguments, **settings):
        self.interrupt()
        return super().integrate(*arguments, **settings)


class Seen(pl.Callback):
    """The weights that the module shows in each hook, and those that samplers would be given."""

    def __init__(self) -> None:
        self.raw: list[dict[str, Tensor]] = []
        self.sampled: list[dict[str, Tensor]] = []

    def look(self, trainer, module, *_):
        self.raw.append(weights(module))
        self.sampled.append({k: v.clone() for k, v in module.run.sampled_model().net.state_dict().items()})

    on_train_start = on_train_batch_start = on_train_batch_end = on_train_epoch_end = on_train_end = look
    on_before_optimizer_step = on_before_zero_grad = look


def driven(ema: EMA, values: list[float], size: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """The average after each optimizer step, for steps of ``size`` images that set the weights to these values."""
    module, trainer = digits_module(), SimpleNamespace(global_step=0)
    module.model.net.to(dtype)
    ema.setup(trainer, module, "fit")
    averages = []
    for value in values:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(value)
        trainer.global_step += 1
        module.images_seen += size
        ema.on_train_batch_end(trainer, module, None, None, 0)
        (average,) = torch.cat([p.flatten() for p in ema.model(module).net.parameters()]).unique().tolist()
        averages.append(average)
    return averages


def test_the_average_is_the_closed_form():
    values = [1.0, -2.0, 0.5, 3.0, 3.0, -1.0]
    averages = driven(EMA([40], ramp=0.5), values, 16)
    expected = average = values[0]  # of nothing before it
    for step, value in enumerate(values[1:], start=2):
        decay = 0.5 ** (16 / min(40, 0.5 * 16 * step))  # from the sixth step on the half-life is 40
        average = decay * average + (1 - decay) * value
        assert averages[step - 1] == pytest.approx(average, rel=1e-6)
    assert averages[0] == expected


@pytest.mark.parametrize("size", [4, 16, 64])
def test_a_half_life_is_in_images_whatever_the_batch_size(size):
    averages = driven(EMA([128], ramp=1e9), [0.0] + [1.0] * (256 // size), size)
    assert averages[128 // size] == pytest.approx(0.5, rel=1e-5)
    assert averages[256 // size] == pytest.approx(0.75, rel=1e-5)


def test_early_on_the_half_life_is_a_share_of_the_images_seen():
    # With half-life r n the weight of the images before n0 falls like (n0 / n)^(ln 2 / r), here 1 / n.
    averages = driven(EMA([SLOW], ramp=0.6931472), [0.0] * 50 + [1.0] * 50, 8)
    assert averages[-1] == pytest.approx(0.5, abs=0.01)


def test_several_averages_at_once(tmp_path):
    ema, module = EMA([50, 500], ramp=1e9), digits_module()
    assert ema.names == ("ema_50", "ema_500")
    fit(module, tmp_path, 10, ema)
    raw, fast, slow, sampled = (
        next(net.parameters()).detach()
        for net in (module.model.net, *(ema.model(module, name).net for name in (*ema.names, None)))
    )
    assert torch.equal(sampled, fast)  # samples are drawn from the first
    assert 0 < (fast - raw).norm() < (slow - raw).norm()
    assert set(ema.averaged_weights()) == {"ema_50", "ema_500"}


def saved(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(raw, averaged) weights of a checkpoint file."""
    checkpoint = load(path)
    raw = {name.removeprefix("model.net."): value for name, value in checkpoint["state_dict"].items()}
    return raw, next(iter(checkpoint["ema"].values()))


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(not torch.equal(a[name], b[name]) for name in a if a[name].any())


# The five bugs of averaging by swapping weights, each provoked here.


def test_bug_1_a_checkpoint_taken_while_sampling_is_not_swapped(tmp_path):
    module, ema, path = digits_module(), EMA([100]), tmp_path / "a.ckpt"
    moments = []

    def save():
        if module.images_seen == 60:
            moments.append((weights(module), {k: v.clone() for k, v in ema.averaged_weights()["ema_100"].items()}))
            module.trainer.save_checkpoint(path)

    fit(module, tmp_path, 10, ema, SampleGrid(12, Interrupting(save), columns=1))
    raw, averaged = saved(path)
    assert same(raw, moments[0][0])
    assert same(averaged, moments[0][1])
    assert different(raw, averaged)

    resumed, its_ema = digits_module(), EMA([100])
    fit(resumed, tmp_path, 10, its_ema, resume=path)
    assert same(weights(resumed), weights(module))
    assert same(its_ema.averaged_weights()["ema_100"], ema.averaged_weights()["ema_100"])


def test_bug_1_nor_is_one_taken_when_sampling_fails(tmp_path):
    module, ema = digits_module(), EMA([100])

    def fail():
        raise RuntimeError("the sampler broke")

    callbacks = ema, OnExceptionCheckpoint(tmp_path, "e"), SampleGrid(60, Interrupting(fail))
    with pytest.raises(RuntimeError, match="the sampler broke"):
        fit(module, tmp_path, 9, *callbacks, enable_checkpointing=True)
    raw, averaged = saved(tmp_path / "e.ckpt")
    assert module.images_seen == 60
    assert same(raw, weights(module))
    assert same(averaged, ema.averaged_weights()["ema_100"])
    assert different(raw, averaged)


def test_bug_2_a_checkpoint_of_weights_only_holds_both(tmp_path):
    module, ema, path = digits_module(net=tiny_unet), EMA([100]), tmp_path / "w.ckpt"
    fit(module, tmp_path, 5, ema).save_checkpoint(path, weights_only=True)
    assert "optimizer_states" not in load(path)
    raw, averaged = saved(path)
    assert same(raw, weights(module))
    assert same(averaged, ema.averaged_weights()["ema_100"])
    assert same(fmlit.load(path, "ema").net.state_dict(), averaged)
    assert same(fmlit.load(path, "raw").net.state_dict(), raw)


def test_bug_3_every_hook_sees_trained_weights_and_samples_averaged_ones(tmp_path):
    plain, before, after, ema = Seen(), Seen(), Seen(), EMA([100])
    fit(digits_module(), tmp_path, 6, plain)
    module = digits_module()
    fit(module, tmp_path, 6, before, ema, after, SampleGrid(24, ODESampler("euler", 2), columns=1))
    for seen in (before, after):
        assert len(seen.raw) == len(plain.raw) == 3 + 4 * 6
        assert all(same(a, b) for a, b in zip(seen.raw, plain.raw, strict=True))
    average = ema.averaged_weights()["ema_100"]
    assert same(before.sampled[-1], average)  # in on_train_end, in either order
    assert same(after.sampled[-1], average)
    assert different(average, weights(module))


def test_bug_3_samples_and_checkpoints_do_not_lag_behind_in_any_order(tmp_path):
    """Whoever comes first brings the average up to date, and once."""
    grid = SampleGrid(12, ODESampler("euler", 2), columns=1)
    for folder in ("first", "last"):
        ema = EMA([100])
        callbacks = [Checkpoint(12, keep=9), Seen(), grid]
        callbacks.insert(0 if folder == "first" else 3, ema)
        fit(digits_module(), tmp_path / folder, 6, *callbacks)
    for images in range(12, 84, 12):
        pictures = [RunFolder(tmp_path / folder).sample_grid(images).read_bytes() for folder in ("first", "last")]
        assert pictures[0] == pictures[1]
        (raw, average), others = (saved(RunFolder(tmp_path / f).checkpoint(images)) for f in ("first", "last"))
        assert same(raw, others[0])
        assert same(average, others[1])
    assert same(average, ema.averaged_weights()["ema_100"])


def test_an_average_of_another_run_is_not_sampled_from(tmp_path):
    module, ema = digits_module(), EMA([100])
    fit(module, tmp_path, 2, ema)
    assert module.run.sampled_model().net is ema.copies["ema_100"]
    fit(module, tmp_path, 2)
    assert module.run.averages is None
    assert module.run.sampled_model() is module.model


def test_a_module_of_another_program_is_refused_by_name(tmp_path):
    for callback in (EMA(), SampleGrid(12), Checkpoint(12), QualityCurve(12)):
        with pytest.raises(ValueError, match=f"{type(callback).__name__} needs a module of fmlit, .* got BoringModel"):
            callback.setup(pl.Trainer(accelerator="cpu", default_root_dir=tmp_path), BoringModel(), "fit")


def test_bug_4_there_is_no_delayed_start_at_which_the_initial_weights_are_scored(tmp_path):
    initial, seen = weights(digits_module()), Seen()
    fit(digits_module(), tmp_path, 20, EMA([SLOW]), seen)
    assert same(seen.sampled[0], initial)
    after_each_step = range(5, len(seen.raw), 4)  # the ends of batches
    assert same(seen.sampled[4], seen.raw[4])  # the first step is the whole average

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum((a[name] - b[name]).norm() for name in a)

    for i in after_each_step:
        assert distance(seen.sampled[i], seen.raw[i]) < 0.5 * distance(initial, seen.raw[i])


def test_bug_5_only_the_network_is_copied_and_one_kernel_averages_it(tmp_path, monkeypatch):
    calls, lerp = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda a, b, w: calls.append(len(a)) or lerp(a, b, w))
    features = NetworkFeatures(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "heavy")
    curve = QualityCurve(10**6, 16, features, ("fid",), ODESampler("euler", 4), cache=str(tmp_path / "cache"))
    module, ema = digits_module(), EMA([100])
    fit(module, tmp_path, 5, ema, curve)
    net = module.model.net
    assert [p.shape for p in ema.copies["ema_100"].parameters()] == [p.shape for p in net.parameters()]
    assert calls == [len(list(net.parameters()))] * 4  # the first step copies
    assert not any(p.requires_grad for p in ema.copies["ema_100"].parameters())
    assert not any(m.training for m in ema.copies["ema_100"].modules())


def test_bug_5_averages_of_bfloat16_weights_move():
    # 1.0078125 follows 1 in bfloat16; a decay of 0.9999 moves the average by a ten-thousandth of that
    size = 100
    ema = EMA([size * 6931], ramp=1e9)
    averages = driven(ema, [1.0] + [1.0078125] * 20, size, torch.bfloat16)
    assert averages[-1] - 1 == pytest.approx(0.0078125 * (1 - 0.9999**20), rel=0.1)
    assert {p.dtype for p in ema.copies[ema.names[0]].parameters()} == {torch.float32}


def test_running_statistics_are_those_of_the_trained_network(tmp_path):
    class Normed(MLP):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, width=32, depth=1)
            self.outputs[0] = nn.BatchNorm1d(32)

    ema = EMA([100, 1000])
    module = digits_module(net=Normed)
    fit(module, tmp_path, 3, ema)
    buffers = dict(module.model.net.named_buffers())
    assert buffers["outputs.0.running_mean"].abs().max() > 0.01
    for name in ema.names:
        assert same(dict(ema.model(module, name).net.named_buffers()), buffers)
        assert not same(dict(ema.model(module, name).net.named_parameters()), dict(module.model.net.named_parameters()))


def test_buffers_that_a_network_makes_or_replaces_as_it_runs(tmp_path):
    class Caching(MLP):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, width=32, depth=1)
            self.register_buffer("cache", None)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, t, labels=None):
            self.cache = torch.ones(len(x))
            self.calls = self.calls + 1
            return super().forward(x, t, labels)

    ema = EMA([100])
    module = digits_module(net=Caching)
    fit(module, tmp_path, 3, ema)
    assert ema.model(module).net.calls == module.model.net.calls == 3


def test_the_average_moves_once_per_optimiser_step(tmp_path, monkeypatch):
    calls, lerp = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda a, b, w: calls.append(w) or lerp(a, b, w))
    fit(digits_module(), tmp_path, 5, EMA([10]), accumulate_grad_batches=3)
    assert calls == pytest.approx([1 - 0.5 ** (12 / min(10, 0.05 * 12 * step)) for step in range(2, 6)])


def test_a_checkpoint_without_the_average_is_refused(tmp_path):
    fit(digits_module(), tmp_path, 2, EMA([100, 200])).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"has no average ema_300, only \['ema_100', 'ema_200'\]: keep ema.half_lives"):
        fit(digits_module(), tmp_path, 4, EMA([100, 300]), resume=tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"half_lives": []}, r"distinct positive numbers of images, got \[\]"),
        ({"half_lives": [0]}, r"got \[0\]"),
        ({"half_lives": [5, 5]}, r"got \[5, 5\]"),
        ({"ramp": 0.0}, "ema.ramp must be positive, got 0.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMA(**arguments)


def test_arguments_are_kept():
    ema = EMA([1, 2], 0.3)
    assert (ema.half_lives, ema.ramp) == ((1, 2), 0.3)


def test_nothing_is_copied_where_nothing_is_trained():
    ema = EMA()
    ema.setup(SimpleNamespace(), digits_module(), "validate")
    assert ema.copies == {}
