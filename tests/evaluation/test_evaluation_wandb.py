"""``evaluate.py --wandb``: the table, the plot and the scores in one run, however often the sweep is gone on with."""

import json

import pytest
import wandb
from PIL import Image

from fmlit.cli.evaluate import Sweep, evaluate
from fmlit.cli.options import Integers
from fmlit.cli.scoring_options import ScoringOptions
from tests.helpers.known_model import known_model, save_run
from tests.helpers.wandb_files import history, no_account, recorded  # noqa: F401  # a fixture among them

pytestmark = [
    pytest.mark.usefixtures("no_account"),
    pytest.mark.filterwarnings("ignore:a Fréchet distance from .. images in 64 dimensions"),
]


def test_table_plot_and_scores_are_in_one_run(tmp_path):
    checkpoint = str(save_run(tmp_path / "runs" / "known", known_model()))
    out = tmp_path / "out"
    scoring = ScoringOptions(cache=str(tmp_path / "cache"), batch_size=40)
    options = {"n": 40, "out": str(out), "scoring": scoring, "wandb": "course"}
    cells = []
    for steps in ([2], [2, 3]):
        cells = evaluate(checkpoint, sweep=Sweep(steps=Integers(steps)), **options)["cells"]
    first, second = recorded(out)
    runs = [
        record.run for records in (first, second) for record in records if record.WhichOneof("record_type") == "run"
    ]
    assert {run.project for run in runs} == {"course"}
    assert len({run.run_id for run in runs}) == 1
    for records, count, folder in zip((first, second), (1, 2), sorted(out.glob("wandb/offline-run-*")), strict=True):
        (row,) = (row for row in history(records) if row.get("evaluation/_type") == "table-file")
        table = json.loads((folder / "files" / row["evaluation/path"]).read_text())
        assert [line[0] for line in table["data"]] == ["heun2", "heun3"][:count]
        assert Image.open(folder / "files" / row["evaluation_plot/path"]).size == (720, 480)
    summaries = [r.summary.update for r in second if r.WhichOneof("record_type") == "summary"]
    kept = {item.key or "/".join(item.nested_key): item.value_json for update in summaries for item in update}
    for cell in cells:
        value = kept[f"{cell['name']}/fd_pixels_40"]
        assert json.loads(value) == pytest.approx(cell["scores"]["fd_pixels_40"])


def test_scores_are_there_without_a_wandb_that_starts(tmp_path, monkeypatch, caplog):
    def refuse(*args, **settings):
        raise OSError("no such service")

    monkeypatch.setattr(wandb, "init", refuse)
    checkpoint = str(save_run(tmp_path / "runs" / "known", known_model()))
    scoring = ScoringOptions(cache=str(tmp_path / "cache"), batch_size=40)
    sweep = Sweep(steps=Integers([2]))
    told = evaluate(checkpoint, n=40, sweep=sweep, out=str(tmp_path / "out"), scoring=scoring, wandb="course")
    assert len(told["cells"]) == 1
    assert "W&B: not recording this run (no such service)" in caplog.messages
