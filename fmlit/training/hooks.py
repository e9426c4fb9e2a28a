"""The base class of fmlit's callbacks, whose hooks get a ``GenerativeModule``."""

from typing import Any

import lightning.pytorch as pl

from fmlit.core.errors import UserError
from fmlit.training.modules import GenerativeModule

# Lightning declares the module of a hook as a LightningModule, and no override may narrow that. For a type checker this
# base is Any, so that the hooks of callbacks can say what ``Callback.setup`` makes sure of.
_Base: Any = pl.Callback


class Callback(_Base):
    """A callback that works with a ``GenerativeModule`` only, and says so when a fit starts."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if not isinstance(pl_module, GenerativeModule):
            raise UserError(
                f"{type(self).__name__} needs a module of fmlit, such as FlowMatchingModule, "
                f"got {type(pl_module).__name__}"
            )
