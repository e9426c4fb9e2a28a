"""Curves of runs: what metrics.csv holds, drawn against images seen."""

import pytest

from docs.draw.curves import read_metrics, training_curves
from fmlit.core.errors import UserError

ROWS = """step,images_seen,loss,loss_t/0.00-0.50,loss_t/0.50-1.00
1,10,4.0,6.0,2.0
2,20,2.0,3.0,1.0
3,30,,,
"""


def test_curves_of_runs_are_of_their_metrics(tmp_path):
    (tmp_path / "metrics.csv").write_text(ROWS)
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert metrics["loss"] == ([10.0, 20.0], [4.0, 2.0])
    figure = training_curves({"run": metrics, "again": metrics})
    assert [panel.get_title() for panel in figure.axes] == ["run", "again"]
    early, late, total = figure.axes[0].lines
    assert list(total.get_ydata()) == [4.0, 2.0]
    assert (early.get_label(), list(early.get_ydata())) == ("t 0.00-0.50", [6.0, 3.0])
    assert early.get_color() != late.get_color()


def test_missing_and_empty_metrics_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*metrics\.csv; give folders of runs"):
        read_metrics(tmp_path / "metrics.csv")
    (tmp_path / "metrics.csv").write_text("step,images_seen,loss\n")
    with pytest.raises(UserError, match=r"metrics\.csv holds no metrics yet"):
        read_metrics(tmp_path / "metrics.csv")
