"""Autoguidance in closed form, and networks that compute in bfloat16, from the sampler to the scripts."""

import json
from pathlib import Path

import pytest
import torch

from fmlit.cli import evaluate as evaluation, sample as sampling
from fmlit.cli.options import Integers, Names, Numbers, run
from fmlit.cli.scoring_options import ScoringOptions
from fmlit.core.randomness import image_noise, image_seeds
from fmlit.flows.paths import CosinePath
from fmlit.flows.predictions import PreconditionedVelocity
from fmlit.models.generative_model import GenerativeModel
from fmlit.sampling.generate import generate
from fmlit.sampling.grids import UniformGrid
from fmlit.sampling.samplers import ChurnSampler, ODESampler, SDESampler
from tests.helpers.known_model import STD, known_model, save_run
from tests.helpers.small_runs import tiny_mlp, tiny_unet

SEEDS, LABELS = image_seeds(0, range(4)), torch.arange(4)
GUIDE_STD = 0.6


def guide_model(std: float = GUIDE_STD, **arguments) -> GenerativeModel:
    model = known_model(**arguments)
    return GenerativeModel(model.net, model.path, PreconditionedVelocity(std), model.shape, model.num_classes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    return str(save_run(folder / "model", known_model())), str(save_run(folder / "guide", guide_model()))


def said(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("classes", [None, 10])
def test_autoguidance_of_gaussians(scale, classes):
    """The field of N(0, s^2) carries eps to s eps: guided, the logarithms of s are extrapolated as the fields are."""
    sampler = ODESampler("rk4", 40, UniformGrid(), guidance=scale)
    drawn = sampler.sample(known_model(), SEEDS, LABELS, guide=guide_model(num_classes=classes))
    expected = STD**scale / GUIDE_STD ** (scale - 1) * image_noise(SEEDS, (1, 8, 8))
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", [ODESampler, SDESampler, ChurnSampler])
def test_the_name_says_how_it_was_guided(sampler):
    guided = sampler(steps=5, guidance=1.5)
    assert guided.name.endswith("5+cfg1.5")
    assert guided.named(guided=True).endswith("5+auto1.5")
    assert sampler(steps=5, precision="bfloat16").name.endswith("5+bfloat16")
    assert sampler(steps=5).named(guided=True) == sampler(steps=5).name


def test_every_sample_gets_the_guide():
    sampler, guide = ODESampler("heun", 8, guidance=2.0), guide_model()
    drawn = torch.cat([x for _, x in generate(known_model(), sampler, 4, batch_size=3, guide=guide)])
    expected = sampler.sample(known_model(), SEEDS, LABELS, guide=guide)
    torch.testing.assert_close(drawn, expected)


def test_a_guide_is_of_the_same_data_and_path():
    sampler = ODESampler(guidance=2.0)
    with pytest.raises(ValueError, match=r"the guide has the path CosinePath\(\), the model CondOTPath\(\)"):
        sampler.sample(known_model(), SEEDS, LABELS, guide=guide_model(path=CosinePath()))
    with pytest.raises(ValueError, match=r"the guide has the shape \(1, 4, 4\), the model \(1, 8, 8\)"):
        sampler.sample(known_model(), SEEDS, LABELS, guide=guide_model(shape=(1, 4, 4)))
    with pytest.raises(ValueError, match="class id 2 is unknown: this model has classes 0 to 1"):
        sampler.sample(known_model(), SEEDS, LABELS, guide=guide_model(num_classes=2))


@pytest.mark.parametrize("net", [tiny_mlp, tiny_unet])
def test_bfloat16_is_of_the_network_alone(net):
    torch.manual_seed(0)
    net = net((1, 8, 8), 10)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model, dtypes = known_model().with_net(net), set()
    exact = ODESampler("heun", 6).sample(model, SEEDS, LABELS)
    layer = next(part for part in net.modules() if isinstance(part, torch.nn.Linear))
    handle = layer.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    rounded = ODESampler("heun", 6, precision="bfloat16").sample(model, SEEDS, LABELS)
    handle.remove()
    assert dtypes == {torch.bfloat16}
    assert rounded.dtype == torch.float32
    difference = (rounded - exact).norm() / exact.norm()
    assert 1e-5 < difference < 0.02
    assert not torch.equal(rounded, rounded.bfloat16().float())  # the state kept its precision


def test_unknown_precision():
    with pytest.raises(ValueError, match="unknown precision 'half': choose from float32, bfloat16"):
        ODESampler(precision="half")


def test_the_scripts_take_a_guide(runs, tmp_path, capsys, monkeypatch):
    model, guide = runs
    options = ["--checkpoint", model, "--guide", guide, "--guidance", "2", "--n", "20", "--steps", "40"]
    run(sampling.sample, [*options, "--out", f"{tmp_path}/a.png", "--save-images", f"{tmp_path}/a.npz"])
    assert said(capsys)["sampler"] == "heun40+auto2"
    told = evaluation.evaluate(
        model,
        n=40,
        out=str(tmp_path / "out"),
        sweep=evaluation.Sweep(steps=Integers([4]), guidance=Numbers([1.0, 2.0]), guide=guide),
        scoring=ScoringOptions(cache=str(tmp_path / "cache")),
    )
    assert [cell["name"] for cell in told["cells"]] == ["heun4", "heun4+auto2"]
    assert [cell["nfe"] for cell in told["cells"]] == [7, 14]  # of both networks
    assert told["cells"][1]["protocol"].endswith("heun4+auto2")
    lines = [json.loads(line) for line in Path(told["results"]).read_text().splitlines()]
    assert all(line["guide"] and line["guide"] != line["of"] for line in lines)


def test_what_a_guide_cannot_be(runs, tmp_path, capsys):
    model, _ = runs
    for arguments, message in [
        (["--guide", str(tmp_path / "none.ckpt")], "give --guide a .ckpt file, the folder of a run, or an exported"),
        (["--precision", "float8"], "precision"),
        (["--compile", "fast"], "compile"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            run(sampling.sample, ["--checkpoint", model, *arguments, "--out", f"{tmp_path}/x.png"])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(ValueError, match=r"--guide has no meaning with --metrics bpd"):
        evaluation.evaluate(model, metrics=Names(["bpd"]), sweep=evaluation.Sweep(guide=model))
