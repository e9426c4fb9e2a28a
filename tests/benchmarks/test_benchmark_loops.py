"""What the contenders of the benchmark do: the bare loop trains as fmlit does, the peers train at all."""

from dataclasses import replace

import pytest
import torch

from benchmarks import contenders, loops, published
from benchmarks.sampling import SOLVERS, count_evaluations
from benchmarks.training import built, peak_memory
from benchmarks.workload import NETS, Workload, recipe
from fmlit.models.unet import UNet
from fmlit.sampling.build import build_sampler
from fmlit.sampling.grids import UniformGrid
from fmlit.training.modules import FlowMatchingModule
from tests.helpers.tiny_benchmark import setup

CPU = torch.device("cpu")


@pytest.fixture
def work(tmp_path):
    with built(setup(tmp_path), 1) as cli:
        return Workload.of(cli, CPU)


def test_the_bare_loop_minimises_what_fmlit_minimises(work):
    """On the same noise, times and labels, its loss is the module's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bare = loops.BareLoop(work)
        torch.nn.init.normal_(bare.net.unet.conv_out.weight)
        z, labels = bare.batch()
        torch.manual_seed(1)
        loss = bare.loss(z, labels)
        torch.manual_seed(1)
        eps, t = torch.randn_like(z), torch.rand(len(z))
    module = FlowMatchingModule(lambda shape, classes: bare.net, (1, 8, 8), 10, conditional=True)
    expected = module.loss(z, eps, t, labels).mean()
    torch.testing.assert_close(loss, expected)
    assert loss > 0.1


def test_the_bare_loop_learns_averages_and_clips(work):
    torch.manual_seed(0)
    bare = loops.BareLoop(work)
    before = [weight.detach().clone() for weight in bare.weights]
    bare.block(0, 5)
    assert bare.images_seen == 20
    assert len(bare.averages) == 2
    moved = [not torch.equal(a, b) for a, b in zip(before, bare.weights, strict=True)]
    assert sum(moved) > len(moved) / 2
    for average in bare.averages:  # half-lives of a twentieth of the images seen: close to the weights, not on them
        assert any(not torch.equal(a, b) for a, b in zip(average, bare.weights, strict=True))
        torch.testing.assert_close(average, [w.detach() for w in bare.weights], atol=1e-3, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, work.net.parameters(), strict=True))  # a copy is trained


def test_batches_of_the_bare_loop_flip_and_drop_as_the_recipe_does(work):
    torch.manual_seed(0)
    bare = loops.BareLoop(replace(work, batch_size=400, flip=True, label_drop=0.25))
    z, labels = bare.batch()
    assert 60 < (labels == 10).sum() < 140
    assert z.min() >= -1
    assert z.max() <= 1
    real = {image.numpy().tobytes() for image in work.images}
    back = z.add(1).mul(127.5).round().to(torch.uint8)
    unflipped = sum(image.numpy().tobytes() in real for image in back)
    assert 120 < unflipped < 280
    mirrored = sum(image.flip(-1).numpy().tobytes() in real for image in back)
    assert unflipped + mirrored >= 400


@pytest.mark.parametrize("name", list(contenders.PEERS))
@pytest.mark.parametrize("variant", ["published", "ours"])
def test_peers_train(name, variant, work):
    peer = contenders.PEERS[name]
    for package in peer.needed[variant]:
        pytest.importorskip(package)
    torch.manual_seed(0)
    choosing = torch.backends.cudnn.benchmark
    loop = getattr(peer, variant)(work)
    if variant == "published":
        loop.load_in_process()
        assert loop.loader.num_workers == 0
    network = getattr(loop, "unet", getattr(loop, "net", None))
    before = [weight.detach().clone() for weight in network.parameters()]
    assert loop.block(1, 2) > 0
    changed = [not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
    assert any(changed)
    assert all(torch.isfinite(weight).all() for weight in network.parameters())
    assert torch.backends.cudnn.benchmark == choosing


def test_the_network_of_torchcfm_is_as_large_as_ours():
    pytest.importorskip("torchcfm")
    from types import SimpleNamespace

    from fmlit.models.unet import UNet

    with torch.device("meta"):
        net = UNet((3, 32, 32))
        theirs = published.own_unet(SimpleNamespace(net=net, conditional=False))
    count = sum(weight.numel() for weight in net.parameters())
    assert count == sum(weight.numel() for weight in theirs.parameters()) == 35_746_307


@pytest.mark.parametrize("name", list(contenders.PEERS))
def test_loaders_of_the_peers_deal_the_pictures(name, work):
    loader = contenders.PEERS[name].loader(work)
    transformed, label = loader.dataset[7]
    expected = work.images[7].float() / 255
    if name != "flow_matching":
        expected = expected * 2 - 1
    torch.testing.assert_close(transformed, expected)
    assert label == work.labels[7]


def test_fresh_batches_leave_out_what_workers_fetch_ahead():
    loader = torch.utils.data.DataLoader(range(8), 1, num_workers=1, prefetch_factor=2)
    batches = published.fresh_batches(loader)
    assert [int(next(batches)) for _ in range(8)] == [2, 3, 4, 5, 6, 7, 0, 1]
    assert int(next(published.fresh_batches(torch.utils.data.DataLoader(range(3), 1)))) == 0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("FlowMatchingModule", "ScoreMatchingModule", "by flow matching, and the recipe by ScoreMatching"),
        ("    conditional: true", "    path: CosinePath", "of a CondOTPath, not of a CosinePath"),
        ("    conditional: true", "    prediction: Noise", "of a Velocity, not of a Noise"),
        ("trainer: {", "trainer: {precision: 64-true, ", "compares 32-true and bf16-mixed, not 64-true"),
    ],
)
def test_recipes_that_the_bare_loop_does_not_follow_are_refused(old, new, said, tmp_path):
    with built(setup(tmp_path, old, new), 1) as cli, pytest.raises(ValueError, match=said):
        Workload.of(cli, CPU)


def test_the_setup_builds_what_train_builds(tmp_path):
    from fmlit.training.averages import EMA
    from fmlit.training.callbacks import TrainingLog

    with built(setup(tmp_path, batch_size=6, precision="bf16-mixed"), 5) as cli:
        kinds = [type(callback) for callback in cli.trainer.callbacks]
        assert {EMA, TrainingLog} <= set(kinds)
        assert cli.trainer.max_steps == 5
        assert cli.datamodule.batch_size == 6
        work = Workload.of(cli, CPU)
        assert work.mixed
        assert (work.clip, work.half_lives, work.learning_rate) == (1.0, (100, 200), cli.model.optimizer.learning_rate)
        folder = cli.run_folder.path
        assert folder.exists()
    assert not folder.exists()


def test_every_network_of_a_name_has_a_recipe():
    assert all(recipe(net).is_file() for net in NETS)
    assert recipe("cifar10").name == "cifar10_flow.yaml"


def test_peak_memory_grows_with_the_network(tmp_path):
    small = peak_memory(setup(tmp_path), "bare")
    wide = setup(tmp_path, "{channels: 32", "{channels: 128")
    with built(wide, 1) as cli:
        weights = sum(weight.nbytes for weight in cli.model.model.net.parameters())
    assert weights > 3e7
    assert peak_memory(wide, "bare") - small > 4 * weights  # gradients, two moments of AdamW, two averages, weights


def test_evaluations_are_those_of_one_sample(work):
    from fmlit.flows.paths import CondOTPath
    from fmlit.flows.predictions import Velocity
    from fmlit.models.generative_model import GenerativeModel

    model = GenerativeModel(work.net, CondOTPath(), Velocity(), (1, 8, 8), 10)
    assert count_evaluations(build_sampler("midpoint", 3, UniformGrid()), model, 2) == 6
    assert not model.net._forward_hooks
    assert "dopri5" not in SOLVERS


def test_layout_and_compiler_are_those_that_are_asked_for(tmp_path, monkeypatch):
    with built(setup(tmp_path, channels_last=True, compile="reduce-overhead"), 1) as cli:
        work = Workload.of(cli, CPU)
    compiled = []
    monkeypatch.setattr(loops, "compile_net", lambda net, mode: compiled.append(mode))
    kernel = loops.BareLoop(work).net.unet.mid_block.resnets[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not kernel.is_contiguous()
    assert cli.model.execution.compile == "reduce-overhead"
    assert compiled == ["reduce-overhead"]
    published_loop = published.PublishedFlowMatching.__new__(published.PublishedFlowMatching)
    published_loop.work, published_loop.device = work, CPU
    assert published_loop._copy_of_net().unet.mid_block.resnets[0].conv1.weight.is_contiguous()


def test_what_an_image_costs(work):
    """A convolution of 8 x 8 pixels has 2 * 64 * 9 * in * out FLOPs; ours has some ten of up to 64 channels."""
    first = 2 * 64 * 9 * 1 * 32
    assert 3 * 20 * first < work.flops() < 3e9
    wide = replace(work, net=UNet((3, 32, 32)), images=torch.zeros(1, 3, 32, 32, dtype=torch.uint8), conditional=False)
    assert wide.flops() / 3e9 == pytest.approx(12.44, abs=0.005)  # torchcfm's, counted with the same tool
