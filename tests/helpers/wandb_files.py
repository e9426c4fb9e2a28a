"""W&B without an account: recorded offline, and read back from its files."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no settings of the machine, and no service left over from another test."""
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "60")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    yield
    wandb.teardown()


def recorded(run: Path) -> Iterator[list[Any]]:
    """The records of each of a run's W&B files, oldest first: a LevelDB log of protocol buffers in 32 KiB blocks."""
    wandb.teardown()  # as at the end of the process: the service writes what it still holds
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        raw, position, record, records = path.read_bytes(), 7, b"", []
        while position + 7 <= len(raw):
            if 32768 - position % 32768 < 7:
                position += 32768 - position % 32768  # padding: a header does not cross blocks
                continue
            _, size, kind = struct.unpack_from("<IHB", raw, position)
            record += raw[position + 7 : position + 7 + size]
            position += 7 + size
            if kind in (1, 4):  # whole, or the last part
                records.append(wandb_internal_pb2.Record.FromString(record))  # type: ignore[attr-defined]
                record = b""
        yield records


def history(records: list[Any]) -> list[dict[str, Any]]:
    items = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in items]
