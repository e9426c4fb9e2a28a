"""Measurements and the file that holds their results, so that an interrupted evaluation continues where it stopped."""

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmlit.core.errors import FileError
from fmlit.core.files import file_errors
from fmlit.core.processes import ProcessGroup

log = logging.getLogger(__name__)

Record = dict[str, Any]  # a line of the results: the identity of a measurement, and what came out (under "scores")


class Measurement(ABC):
    """One line of the results.

    Attributes:
        identity: everything that the scores depend on, as JSON holds it. Its hash is the key of the line.
        files: what the measurement writes besides its line.
    """

    identity: Record
    files: tuple[Path, ...] = ()

    @abstractmethod
    def measure(self) -> Record:
        """Find the scores. All ranks must call it; the record of rank 0 counts."""


class Results:
    """``results.jsonl`` in a folder: one line for each measurement, appended when it is done.

    Two jobs may share the file.

    Raises:
        FileError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "results.jsonl"
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise FileError(f"cannot write {self.path}: its folder is read-only; choose another with --out")

    def complete(self, measurements: Sequence[Measurement], ranks: ProcessGroup) -> list[Record]:
        """The records of all measurements. Only those that the file lacks are measured. Prints a line for each."""
        return [self._complete(measurement, ranks) for measurement in measurements]

    def _complete(self, measurement: Measurement, ranks: ProcessGroup) -> Record:
        record = known = ranks.from_first(lambda: self._find(measurement))
        if record is None:
            outcome = measurement.measure()
            record = ranks.from_first(lambda: self._add(measurement, outcome))
        if ranks.rank == 0:
            scores = "  ".join(f"{name} {value:.4g}" for name, value in record["scores"].items())
            print(f"{_title(record)}: {scores}  ({'known' if known else _cost(record)})", flush=True)
        return record

    def _find(self, measurement: Measurement) -> Record | None:
        """The newest record of an earlier evaluation; None if there is none, or one of its files is gone."""
        if not all(file.exists() for file in measurement.files):
            return None
        key = _key(measurement.identity)
        return next((record for record in reversed(self._read()) if record["key"] == key), None)

    def _add(self, measurement: Measurement, outcome: Record) -> Record:
        """Append a line in one write; returns the record."""
        record = {"key": _key(measurement.identity), **measurement.identity, **outcome}
        half_a_line = self.path.exists() and not self.path.read_bytes().endswith(b"\n")  # of a killed process
        with open(self.path, "ab") as file:
            file.write(b"\n" * half_a_line + json.dumps(record).encode() + b"\n")
        return record

    def _read(self) -> list[Record]:
        records = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else []:
            try:
                record = json.loads(line)
                if "key" in record:
                    records.append(record)
            except (TypeError, ValueError):
                log.warning("skipped a damaged line of %s", self.path)
        return records


def _key(identity: Record) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _title(record: Record) -> str:
    """``heun18 (ema, seed 0)``; the name alone of pictures that no model drew."""
    return f"{record['name']} ({record['weights']}, seed {record['seed']})" if "weights" in record else record["name"]


def _cost(record: Record) -> str:
    if "cost" not in record:  # only distances have one
        return f"{record['seconds']} s"
    a_thousand, memory = record["cost"]["seconds_per_1000"], record["cost"]["peak_memory_gb"]
    return f"{record['seconds']} s; {a_thousand:.3g} s per 1,000 images, peak memory {memory:.2f} GB"
