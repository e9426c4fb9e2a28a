"""Pictures reach every logger that can show one, and one line names those that cannot."""

import pytest
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from PIL import Image

from fmlit.training.loggers import MetricsFile
from fmlit.training.pictures import send_picture
from tests.helpers.tiny_cli import train

PICTURE = Image.new("L", (4, 2), 255)


class Recorder:
    """Stands for the client of a logger."""

    def __init__(self):
        self.calls = []

    def add_image(self, name, array, step, dataformats):
        self.calls.append((name, array.shape, step, dataformats))

    def log_image(self, run_id, picture, key, step):
        self.calls.append((run_id, picture.size, key, step))


@pytest.mark.parametrize(
    ("cls", "call"),
    [(TensorBoardLogger, ("samples", (2, 4, 3), 7, "HWC")), (MLFlowLogger, ("run", (4, 2), "samples", 7))],
)
def test_tensorboard_and_mlflow_get_pictures(cls, call):
    client = Recorder()
    logger = type(cls.__name__, (cls,), {"__init__": lambda self: None, "experiment": client, "run_id": "run"})()
    assert send_picture(logger, "samples", PICTURE, 84, 7)
    assert client.calls == [call]


def test_a_server_that_fails_costs_a_picture_and_not_the_run(caplog):
    client = Recorder()
    client.log_image = None
    logger = type("Server", (MLFlowLogger,), {"__init__": lambda self: None, "experiment": client, "run_id": "run"})()
    assert send_picture(logger, "samples", PICTURE, 84, 7)
    assert caplog.messages == ["Server: a picture was not sent ('NoneType' object is not callable)"]


def test_one_line_names_the_loggers_without_pictures(tmp_path, caplog):
    assert send_picture(MetricsFile(tmp_path), "samples", PICTURE, 84, 7)
    options = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--samples.every=80"]
    assert train(tmp_path, *options).code == 0
    said = [text for text in caplog.messages if "takes no pictures" in text]
    assert said == ["CSVLogger: takes no pictures; those of the samples are in the run folder"]
