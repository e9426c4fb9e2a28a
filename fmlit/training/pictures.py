"""Pictures for loggers, each in the way that it takes them."""

import logging
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from PIL.Image import Image

from fmlit.core.errors import first_line
from fmlit.training.loggers import MetricsFile

log = logging.getLogger(__name__)


def send_picture(logger: Any, name: str, picture: Image, images_seen: int, step: int) -> bool:
    """Send a picture to a logger, and return whether it takes pictures."""
    if hasattr(logger, "log_picture"):
        logger.log_picture(name, picture, images_seen, step)
    elif isinstance(logger, TensorBoardLogger | MLFlowLogger):
        try:
            _send_to_client(logger, name, picture, step)
        except Exception as error:  # of its server or its disk: the picture is in the run folder
            log.warning("%s: a picture was not sent (%s)", type(logger).__name__, first_line(error))
    elif hasattr(logger, "log_image"):
        logger.log_image(name, [picture], step=step)
    else:
        return isinstance(logger, MetricsFile)  # a table, which nobody expects to show any
    return True


def _send_to_client(logger: TensorBoardLogger | MLFlowLogger, name: str, picture: Image, step: int) -> None:
    client: Any = logger.experiment
    if isinstance(logger, TensorBoardLogger):
        client.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    else:
        client.log_image(logger.run_id, picture, key=name, step=step)


def warn_of_loggers_without_pictures(loggers: list[Logger]) -> None:
    """One line for all of them."""
    names = ", ".join(sorted({type(logger).__name__ for logger in loggers}))
    log.warning("%s: takes no pictures; those of the samples are in the run folder", names)
