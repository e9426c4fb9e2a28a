"""The benchmark measures what it says: turns, ratios, what is missing, what is refused. Tiny, and untimed."""

import json
import math
import statistics

import pytest
import torch

from benchmarks import contenders, loops, ranks, training
from benchmarks.command import SOME, benchmark
from benchmarks.outcome import Report
from benchmarks.rounds import Round, rates, run_rounds
from benchmarks.training import Blocks, built, fit_in_blocks, race
from fmlit.cli.options import run
from fmlit.training.modules import FlowMatchingModule
from tests.helpers.tiny_benchmark import setup
from tests.helpers.tiny_cli import Outcome

ROUNDS, LEAD, STEPS = 2, 1, 2


def command(capsys, *args: str) -> Outcome:
    code = 0
    try:
        run(benchmark, args)
    except SystemExit as end:
        code = int(end.code or 0)
    return Outcome(code, *capsys.readouterr())


class Recorded(loops.BareLoop):
    """Writes down when its turn comes, and how far it was then."""

    turns: list[tuple[str, int]]

    def block(self, lead, steps):
        seconds = super().block(lead, steps)
        self.turns.append((type(self).__name__, self.images_seen))
        return seconds


def test_contenders_take_turns_and_each_goes_on_where_it_stood(tmp_path, monkeypatch):
    turns = []
    first = type("First", (Recorded,), {"turns": turns})
    second = type("Second", (Recorded,), {"turns": turns})
    steps = []
    original = FlowMatchingModule.training_step

    def counting(self, batch, batch_idx):
        steps.append(len(turns))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(FlowMatchingModule, "training_step", counting)
    done, work = race(setup(tmp_path), {"bare": first, "other": second}, LEAD, STEPS, ROUNDS, lambda _: None)
    seen = work.batch_size * (LEAD + STEPS)
    assert turns == [("First", seen), ("Second", seen), ("First", 2 * seen), ("Second", 2 * seen)]
    assert steps == [0] * (LEAD + STEPS) + [2] * (LEAD + STEPS)  # fmlit first in each round, in one fit
    assert [list(turn.seconds) for turn in done] == [["fmlit", "bare", "other"]] * ROUNDS
    assert all(len(turn.load_average) == 3 and min(turn.seconds.values()) > 0 for turn in done)


def test_blocks_count_whole_steps_without_what_happens_between_them(tmp_path, monkeypatch):
    clock = iter(range(1000))
    times = []

    def tick(device):
        times.append(next(clock))
        return times[-1]

    monkeypatch.setattr(training, "now", tick)
    seconds = []
    with built(setup(tmp_path), 2 * (3 + 4)) as cli:

        def between(duration):
            seconds.append((duration, cli.model.images_seen // 4))
            tick(None)  # another's turn

        fit_in_blocks(cli, Blocks(3, 4, between))
        assert cli.trainer.global_step == 14
    assert seconds == [(1, 7), (1, 14)]
    assert times == list(range(6))  # started, stopped and another's turn, twice: read at no other step


def test_rates_are_medians_and_ratios_of_the_same_round():
    turns = [{"bare": 1.0, "a": 2.0}, {"bare": 10.0, "a": 5.0}, {"bare": 2.0, "a": 4.0}]
    done = [Round((0.0, 0.0, 0.0), seconds) for seconds in turns]
    result = rates(done, {"bare": 20, "a": 20}, "bare")
    assert result["a"]["images_per_second"] == 5.0
    assert (result["a"]["images_per_second_lowest"], result["a"]["images_per_second_highest"]) == (4.0, 10.0)
    assert result["a"]["ratio"] == 0.5  # of medians over all rounds it would be 5 / 10
    assert result["a"]["ratio_highest"] == 2.0
    assert result["bare"]["ratio"] == result["bare"]["ratio_lowest"] == 1.0
    assert "ratio" not in rates(done, {"bare": 20, "a": 20})["a"]


def test_rounds_alternate():
    order = []

    def block(name):
        return lambda: order.append(name) or 1.0

    done = run_rounds({name: block(name) for name in "abc"}, 3, lambda _: None)
    assert "".join(order) == "abc" * 3
    assert len(done) == 3


def test_the_command_measures_training_and_names_who_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    monkeypatch.setattr(training, "peak_memory", None)  # called for nobody
    out = tmp_path / "made" / "benchmark.json"
    sizes = ["--rounds=2", "--steps=2", "--lead=1", "--device=cpu", "--memory=off"]
    ended = command(capsys, f"--net={setup(tmp_path).recipe}", f"--out={out}", *sizes)
    summary = ended.summary
    assert list(summary["results"]) == ["fmlit", "bare", "diffusers_ours"]
    absent = ["torchcfm_published", "torchcfm_ours", "flow_matching_published", "flow_matching_ours"]
    assert list(summary["missing"]) == [*absent, "diffusers_published"]
    for name in summary["missing"]:
        assert f"{name} is left out: " in ended.err
    assert ended.err.count("pip install -e '.[bench]'") == 5
    record = json.loads(out.read_text())
    assert record["missing"] == summary["missing"]
    assert {"torch", "lightning", "python", "fmlit", "torchcfm"} <= set(record["versions"])
    assert record["hardware"]["threads"] == torch.get_num_threads()
    assert record["hardware"]["cpu"]
    assert record["details"]["shape"] == [1, 8, 8]
    assert record["details"]["batch_size"] == 4
    assert [list(turn["seconds"]) for turn in record["rounds"]] == [list(summary["results"])] * 2
    for name, result in record["results"].items():
        assert all(math.isfinite(value) for value in result.values())
        speeds = [STEPS * 4 / turn["seconds"][name] for turn in record["rounds"]]
        assert result["images_per_second"] == pytest.approx(statistics.median(speeds))
        assert result["ms_per_step"] > 0
    assert record["results"]["bare"]["ms_over_bare"] == 0
    rows = [line for line in ended.out.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["", rows[1].split("|")[1].strip(), *summary["results"]]


def test_json_alone_holds_the_whole_record(tmp_path, capsys):
    out = tmp_path / "a.json"
    sizes = ["--rounds=2", "--images=30", "--device=cpu", "--features=fmlit.PixelFeatures"]
    ended = command(capsys, "--what=fid", f"--net={setup(tmp_path).recipe}", f"--out={out}", "--json", *sizes)
    assert len(ended.out.splitlines()) == 1
    assert ended.summary == json.loads(out.read_text())
    assert ended.summary["details"]["dimension"] == 64
    seconds = [turn["seconds"]["features"] for turn in ended.summary["rounds"]]
    per_1000 = ended.summary["results"]["features"]["seconds_per_1000"]
    assert per_1000 == pytest.approx(statistics.median(seconds) * 1000 / 30)


def test_data(tmp_path):
    sizes = {"rounds": 2, "steps": 2, "lead": 1, "device": "cpu", "out": str(tmp_path / "a.json")}
    summary = benchmark("data", str(setup(tmp_path).recipe), peers=["diffusers"], **sizes)  # type: ignore[arg-type]
    assert list(summary["results"]) == ["fmlit", "bare", "diffusers_published"]
    assert all(result["ratio"] > 0 for result in summary["results"].values())


def test_sampling_counts_evaluations(tmp_path):
    given = {"solvers": ["euler", "heun", "rk4", "euler_maruyama"], "evaluations": [5, 10]}
    out = str(tmp_path / "a.json")
    summary = benchmark("sampling", str(setup(tmp_path).recipe), 2, batch_size=2, device="cpu", out=out, **given)  # type: ignore[arg-type]
    counts = {name: result["evaluations"] for name, result in summary["results"].items()}
    assert counts["euler at 5"] == counts["euler_maruyama at 5"] == 5
    assert counts["heun at 5"] == counts["rk4 at 5"] == 4
    assert counts["heun at 10"] == 10
    assert counts["rk4 at 10"] == 8
    assert all(result["images_per_second"] > 0 for result in summary["results"].values())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--what=speed"], "what: Expected one of "),
        (["--net=cifar"], "net: cifar is neither cifar10 nor small nor the YAML file of a recipe; did you mean"),
        (["--peers=torchcfm,jax"], "peers: there is no jax; choose from torchcfm, flow_matching, diffusers, or none"),
        (["--what=sampling", "--peers=none"], "peers is an option of --what training and data, not of sampling"),
        (["--what=startup", "--batch_size=4"], "batch_size is an option of --what training and"),
        (["--what=sampling", "--solvers=dopri5"], "solvers: dopri5 is none of euler, midpoint,"),
        (["--what=ranks", "--threads=2"], "threads is an option of --what training and sampling and startup and"),
        (["--rounds=0"], "rounds must be at least 1, got 0"),
        (["--steps=0"], "steps must be at least 1, got 0"),
        (["--lead=0"], "lead must be at least 1, got 0"),
        (["--out=benchmark.txt"], "benchmark.txt must end in .json"),
        (["--device=tpu9"], "device 'tpu9' cannot be used"),
        (["--precision=16-mixed"], "precision: Expected one of "),
        (["--round=3"], "round: no such option; did you mean rounds?"),
    ],
)  # fmt: skip
def test_mistakes_take_one_line(args, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert said in command(capsys, *args).error
    assert not list(tmp_path.iterdir())


def test_options_that_only_some_measurements_take_are_options():
    import inspect

    parameters = inspect.signature(benchmark).parameters
    assert all(parameters[name].default is None for name in SOME)


def test_exchange_spans_are_counted_once():
    assert ranks.union([]) == 0
    assert ranks.union([(0, 2), (1, 3), (5, 6)]) == 4
    assert ranks.union([(4, 5), (0, 10)]) == 10


def test_two_processes_against_one(tmp_path):
    outcome = ranks.ranks(setup(tmp_path), LEAD, STEPS, ROUNDS, Report(ROUNDS))
    assert list(outcome.results) == [ranks.ONE, ranks.TWO, ranks.SILENT]
    assert [list(turn.seconds) for turn in outcome.rounds] == [[ranks.ONE, ranks.TWO, ranks.SILENT]] * ROUNDS
    assert 0 < outcome.results[ranks.TWO]["share_communicating"] <= 1
    assert outcome.results[ranks.TWO]["share_waiting"] < 1
    assert "share_communicating" not in outcome.results[ranks.SILENT]
    assert outcome.details["backend"] == "gloo"


@pytest.mark.faults
def test_a_process_that_fails_ends_all_of_them(tmp_path):
    broken = setup(tmp_path, "batch_size: 4", "batch_size: 3")  # no even split over two
    with pytest.raises(ValueError, match=r"ranks: process \d ended with"):
        ranks.ranks(broken, LEAD, STEPS, ROUNDS, Report(ROUNDS))


@pytest.mark.slow
def test_startup_of_the_training_command(tmp_path):
    from benchmarks.startup import startup

    outcome = startup(setup(tmp_path), 1, Report(1))
    assert set(outcome.results) == {"imports alone", "train.py, built", "train.py, first step"}
    assert outcome.results["train.py, built"]["seconds"] < outcome.results["train.py, first step"]["seconds"]
