"""What the tests of this folder share: a run whose model is known exactly, and where the results go."""

import pytest

from fmlit.cli.scoring_options import ScoringOptions
from tests.helpers.known_model import known_model, save_run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_run(tmp_path_factory.mktemp("runs") / "known", known_model()))


@pytest.fixture
def options(tmp_path) -> dict:
    return {"out": str(tmp_path / "out"), "scoring": ScoringOptions(cache=str(tmp_path / "cache"), batch_size=32)}
