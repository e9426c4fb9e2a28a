"""What W&B finds in the environment: variables that it refuses, and no home."""

import os
import tempfile
from pathlib import Path


def give_home() -> None:
    """Set ``HOME`` to a new folder if the user has neither that nor a name, as in Kubernetes. W&B fails without one."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.mkdtemp(prefix="home-")


def drop_refused_settings() -> str:
    """Take variables that W&B refuses out of the environment. Returns what is wrong with them; empty for nothing."""
    import wandb  # not above: it takes a second, and not every run needs it
    from pydantic import ValidationError  # which wandb depends on

    problems: list[str] = []
    while True:
        try:
            wandb.setup()
        except ValidationError as error:
            found = {f"WANDB_{item['loc'][0]}".upper(): item["msg"] for item in error.errors() if item["loc"]}
            given = {name: os.environ.pop(name) for name in found if name in os.environ}
            if not given:
                raise
            problems += [f"{name}={value}: {found[name]}" for name, value in given.items()]
        else:
            return "; ".join(problems)
