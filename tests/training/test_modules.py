from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from fmlit import Digits
from fmlit.core.errors import UserError
from fmlit.core.tensors import expand_time
from fmlit.flows.couplings import Coupling, OptimalTransportCoupling
from fmlit.flows.paths import CondOTPath, CosinePath, PolynomialPath, VPPath
from fmlit.flows.predictions import MAX_GAIN, Noise, PreconditionedVelocity, Score, Velocity
from fmlit.flows.times import LogitNormalTime, TimeDistribution, UniformTime
from fmlit.storage import descriptions
from fmlit.training.averages import EMA
from fmlit.training.draws import GRAIN, TrainingDraws
from fmlit.training.modules import FlowMatchingModule, GenerativeModule, ScoreMatchingModule
from fmlit.training.optimizers import AdamW
from fmlit.training.schedules import LearningRateSchedule
from tests.helpers.oracle import PATHS, PREDICTIONS
from tests.helpers.small_runs import digits_module, fit, tiny_unet

MODULES = [FlowMatchingModule, ScoreMatchingModule]
each_module = pytest.mark.parametrize("make", MODULES)


class Extreme(TimeDistribution):
    """Both ends of the clock, which random times meet once in millions of draws."""

    stratified = False

    def quantile(self, u: Tensor) -> Tensor:
        return u.round()


class Recorded(Coupling):
    """Keeps what it was asked to pair, and its answer."""

    def __call__(self, z: Tensor, eps: Tensor, labels: Tensor | None = None) -> Tensor:
        self.asked, self.answer = (z, eps, labels), OptimalTransportCoupling(group_size=6)(z, eps, labels)
        return self.answer


def rank_of(module: GenerativeModule, rank: int = 0, world_size: int = 1) -> GenerativeModule:
    """The module as this rank of a trainer holds it."""
    module.running = SimpleNamespace(world_size=world_size, global_rank=rank)  # Lightning's reference is weak
    module.trainer = module.running
    return module


def batch(size: int = 6, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (size,), generator=g)
    return {"data": torch.randn(size, 1, 8, 8, generator=g), "labels": labels}


def test_labels_are_dropped_sample_by_sample_at_the_stated_rate():
    module, labels = rank_of(digits_module(draws=TrainingDraws(label_drop=0.2))), torch.arange(10).repeat(500)
    _, _, kept = module._draw(5000, labels)
    dropped = kept == 10
    assert dropped.double().mean().item() == pytest.approx(0.2, abs=0.02)  # standard error 0.006
    assert torch.equal(kept[~dropped], labels[~dropped])
    assert kept.dtype == torch.int64
    small = torch.stack([module._draw(64, labels[i * 64 : (i + 1) * 64])[2] == 10 for i in range(10)])
    assert ((small.sum(1) > 0) & (small.sum(1) < 64)).all()  # never a whole batch


def test_times_noise_and_dropped_labels_are_independent():
    eps, t, labels = rank_of(digits_module(draws=TrainingDraws(label_drop=0.5)))._draw(
        5000, torch.zeros(5000, dtype=torch.int64)
    )
    draws = torch.stack([eps[:, 0, 0, 0], eps.flatten(1).mean(1), t, (labels == 10).float()])
    off_diagonal = torch.corrcoef(draws) - torch.eye(4)
    off_diagonal[0, 1] = off_diagonal[1, 0] = 0  # a pixel and the mean that it is part of
    assert off_diagonal.abs().max() < 0.06  # standard error 0.014


@pytest.mark.parametrize(("drop", "expected"), [(0.0, [0, 1, 2]), (1.0, [10, 10, 10])])
def test_labels_are_never_or_always_dropped(drop, expected):
    module = rank_of(digits_module(draws=TrainingDraws(label_drop=drop)))
    assert module._draw(3, torch.arange(3))[2].tolist() == expected


def test_an_unconditional_module_shows_no_labels():
    module, seen = rank_of(digits_module(conditional=False)), []
    module.model.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[2]))
    module.training_step(batch(), 0)
    assert seen == [None]
    assert module.model.num_classes is None


@pytest.mark.parametrize("law", [UniformTime(), UniformTime(stratified=True), LogitNormalTime()], ids=repr)
@pytest.mark.parametrize(("size", "world_size"), [(12, 2), (12, 3), (64, 2), (72, 2), (150, 3), (150, 5)])
def test_draws_are_global_and_ranks_take_slices(size, world_size, law):
    module, labels = digits_module(draws=TrainingDraws(law, label_drop=0.5)), torch.arange(size) % 10
    alone = rank_of(module)._draw(size, labels)
    share = size // world_size
    slices = [
        rank_of(module, r, world_size)._draw(share, labels[r * share : (r + 1) * share]) for r in range(world_size)
    ]
    for whole, *parts in zip(alone, *slices, strict=True):
        assert torch.equal(whole, torch.cat(parts))
    assert len(alone[0].flatten().unique()) > 0.99 * alone[0].numel()  # no grain of noise repeats another


@pytest.mark.parametrize("world_size", [4, 64])
def test_the_noise_that_a_rank_draws_does_not_grow_with_the_number_of_ranks(monkeypatch, world_size):
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **kw: drawn.append(shape[0][0]) or randn(*shape, **kw))
    share = 48
    eps, _, _ = rank_of(digits_module(), 1, world_size)._draw(share, None)
    assert len(eps) == share
    assert sum(drawn) < share + 2 * GRAIN


def test_draws_depend_on_seed_and_images_seen_and_on_nothing_else():
    module = rank_of(digits_module())

    def draw(images_seen: int, seed: int = 0) -> Tensor:
        module.images_seen, module.seed = images_seen, seed
        eps, t, _ = module._draw(4, None)
        return torch.cat([eps.flatten(), t])

    first = draw(0)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = draw(0)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    others = [first, draw(4), draw(8), draw(0, seed=1)]  # no micro-batch repeats the noise of another
    assert len(torch.cat([d[:256].reshape(4, 64) for d in others]).unique(dim=0)) == 16
    assert len(torch.cat([d[256:] for d in others]).unique()) == 16


def test_dropout_masks_depend_on_rank_and_images_seen_only():
    module = digits_module(net=partial(tiny_unet, dropout=0.5)).train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05

    def loss(images_seen: int, rank: int) -> Tensor:
        module._draw = lambda size, labels: (data["data"], torch.full((6,), 0.5), labels)
        module.images_seen = images_seen
        return rank_of(module, rank, 3).training_step(data, 0)["losses"]

    data = batch()
    first = loss(0, 0)
    torch.manual_seed(99)
    assert torch.equal(first, loss(0, 0))
    assert not torch.equal(first, loss(0, 1))
    assert not torch.equal(first, loss(18, 0))


def test_images_seen_counts_all_ranks():
    module = rank_of(digits_module(), 1, 3)
    for step in range(1, 4):
        module.training_step(batch(4), step)
        assert module.images_seen == 12 * step


@each_module
@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
def test_losses_are_finite_at_both_ends_of_the_clock(prediction, path, make):
    module = rank_of(digits_module(make, path=path, prediction=prediction, draws=TrainingDraws(Extreme())))
    out = module.training_step(batch(16), 0)
    assert {t > 0.5 for t in out["times"].tolist()} == {False, True}
    assert torch.isfinite(out["losses"]).all()
    out["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@each_module
def test_the_loss_is_the_mean_over_samples_of_the_objective(make):
    draws, data = TrainingDraws(label_drop=0.0), batch()
    module = rank_of(digits_module(make, path=CosinePath(), prediction=Noise(), draws=draws))
    eps, t, labels = module._draw(6, data["labels"])
    out = module.training_step(data, 0)
    model, x = module.model, module.model.path.sample(data["data"], eps, t)
    gain = Noise().gains(model.path, t).velocity
    clipped = expand_time(gain.clamp(max=MAX_GAIN) / gain, x)
    residual = {
        FlowMatchingModule: lambda: (
            clipped * (model.velocity(x, t, labels) - model.path.velocity(data["data"], eps, t))
        ),
        ScoreMatchingModule: lambda: model.net(x, t, labels) - eps,
    }[make]()
    torch.testing.assert_close(out["losses"], residual.square().mean((1, 2, 3)).detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out["loss"], out["losses"].mean())
    assert torch.equal(out["times"], t)
    assert not out["losses"].requires_grad
    assert out["loss"].requires_grad


def test_unweighted_score_matching_divides_the_noise_regression_by_beta_squared():
    z, eps, t = torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8), torch.linspace(0.1, 0.9, 6)
    weighted, plain = (rank_of(digits_module(ScoreMatchingModule, weighted=w)) for w in (True, False))
    plain.model.load_state_dict(weighted.model.state_dict())
    expected = weighted.loss(z, eps, t, torch.zeros(6, dtype=torch.int64)) / weighted.model.path.beta(t).square()
    torch.testing.assert_close(plain.loss(z, eps, t, torch.zeros(6, dtype=torch.int64)), expected)


def test_flow_matching_of_a_preconditioned_network_is_a_regression_of_unit_weight():
    prediction = PreconditionedVelocity(0.5)
    module = rank_of(digits_module(prediction=prediction, draws=TrainingDraws(label_drop=0.0)))
    data = batch()
    eps, t, labels = module._draw(6, data["labels"])
    losses = module.training_step(data, 0)["losses"]
    output = module.model(module.model.path.sample(data["data"], eps, t), t, labels)
    target = prediction.target(module.model.path, data["data"], eps, t)
    torch.testing.assert_close(losses, (output - target).square().mean((1, 2, 3)).detach(), rtol=1e-4, atol=1e-6)


def test_data_and_noise_are_paired_by_the_coupling_within_classes():
    coupling = Recorded()
    module = rank_of(digits_module(draws=TrainingDraws(coupling=coupling, label_drop=0.5)))
    data = batch()
    eps, _, labels = module._draw(6, data["labels"])
    seen = []
    module.loss = lambda z, eps, t, labels: seen.append(eps) or t
    module.training_step(data, 0)
    z, drawn, shown = coupling.asked
    assert torch.equal(z, data["data"])
    assert torch.equal(drawn, eps)
    assert torch.equal(shown, labels)  # a dropped label is a class of its own
    assert torch.equal(seen[0], coupling.answer)
    assert not torch.equal(seen[0], eps)


def test_defaults_are_the_courses():
    flow, score = digits_module(FlowMatchingModule).model, digits_module(ScoreMatchingModule).model
    assert (flow.path, flow.prediction) == (CondOTPath(), Velocity())
    assert (score.path, score.prediction) == (VPPath(), Noise())
    assert digits_module(ScoreMatchingModule, prediction=Score(), path=CosinePath()).model.prediction == Score()


@pytest.mark.parametrize(
    ("decay", "factors"), [("constant", [1, 1, 1, 1]), ("linear", [1, 0.5, 0, 0]), ("cosine", [1, 0.5, 0, 0])]
)
def test_the_learning_rate_follows_images(decay, factors):
    module = digits_module(schedule=LearningRateSchedule(1100, warmup_images=100, decay=decay))
    assert [module.schedule.factor(n) for n in (0, 25, 50, 99)] == [0, 0.25, 0.5, 0.99]
    assert [module.schedule.factor(n) for n in (100, 600, 1100, 9999)] == pytest.approx(factors, abs=1e-12)
    if decay == "cosine":
        assert module.schedule.factor(350) == pytest.approx((1 + 0.5**0.5) / 2)


def test_the_learning_rate_does_not_depend_on_the_batch_size_and_every_step_learns(tmp_path):
    class Rates(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step > len(rates):  # not between accumulated batches
                rates.append(trainer.optimizers[0].param_groups[0]["lr"] / 1e-3)

    means = []
    for size, accumulated in ((12, 1), (48, 1), (48, 4)):
        rates: list[float] = []
        module = digits_module(schedule=LearningRateSchedule(960, warmup_images=96, decay="linear"))
        settings = {"accumulate_grad_batches": accumulated}
        fit(module, tmp_path, 960 // size, Rates(), data=Digits(batch_size=size), **settings)
        half = size / 2
        assert rates[0] == pytest.approx(half / 96)
        assert rates[-1] == pytest.approx(half / (960 - 96))
        assert len(rates) == 960 // size
        means.append(sum(rates) / len(rates))
    assert means == pytest.approx([0.5, 0.5, 0.5])  # the area of a triangle


def test_the_optimizer_is_adamw_with_the_settings_of_the_recipe():
    module = digits_module(optimizer=AdamW(3e-4, betas=(0.8, 0.95), weight_decay=0.02))
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.8, 0.95), 0.02)
    assert len(group["params"]) == len(list(module.model.net.parameters()))


def test_a_checkpoint_describes_its_model(tmp_path):
    module = digits_module(net=tiny_unet, path=VPPath(rate_max=15.0), prediction=PreconditionedVelocity(0.4))
    trainer = fit(module, tmp_path, 2, EMA())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    model = descriptions.build(checkpoint["model_description"])
    assert (model.path, model.prediction) == (VPPath(rate_max=15.0), PreconditionedVelocity(0.4))
    assert (model.shape, model.num_classes, model.net.attention) == ((1, 8, 8), 10, (4,))
    assert model.net.state_dict().keys() == module.model.net.state_dict().keys()
    assert checkpoint["images_seen"] == 24
    assert checkpoint["data_description"]["class_path"].endswith("Digits")


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (digits_module, {"num_classes": None}, "conditional: true needs data with classes"),
        (TrainingDraws, {"label_drop": 1.5}, r"label_drop must be a probability in \[0, 1\], got 1.5"),
        (
            LearningRateSchedule,
            {"images": 0},
            "images must be positive, warmup_images and stable_images not negative, got 0, 0 and 0",
        ),
        (LearningRateSchedule, {"warmup_images": -1}, "got 1000000, -1 and 0"),
        (LearningRateSchedule, {"stable_images": -2}, "got 1000000, 0 and -2"),
        (
            LearningRateSchedule,
            {"stable_images": 900, "warmup_images": 100, "images": 1000, "decay": "linear"},
            "stable_images 900 leaves nothing of the 1,000 images for the decay, after 100 for warm-up",
        ),
        (LearningRateSchedule, {"decay": "cosin"}, "unknown decay 'cosin': choose from constant, linear, cosine"),
    ],
)
def test_wrong_arguments_are_named(cls, arguments, message):
    with pytest.raises(UserError, match=message):
        cls(**arguments)


def test_a_polynomial_path_with_a_velocity_network_may_be_scored():
    """W = 0 at t = 0 and beta = 0 at t = 1: there a velocity says nothing of the score."""
    module = digits_module(ScoreMatchingModule, path=PolynomialPath(2.0), prediction=Velocity())
    assert module.time_limits.start > 0
    assert module.time_limits.end < 1
