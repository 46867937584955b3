"""A file of one JSON record a line that a run adds to, and reads back when it goes on."""

import json
import os
from pathlib import Path
from typing import Any

from tlite_jax.errors import UserError
from tlite_jax.telemetry.metrics import replace_file

Record = dict[str, Any]


class History:
    """Records of steps, in a file and in memory. Every process reads; only process 0 writes.

    Args:
      path: the file; need not exist.
      start_step: of the checkpoint that the run goes on from. Records of later steps, left by a try that was
        interrupted, are forgotten. None: all are.
      writes: whether this process keeps the file.

    Raises:
      UserError: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path, start_step: int | None, *, writes: bool):
        self._path, self._writes = path, writes
        found = read_history(path)
        self.records = [] if start_step is None else [record for record in found if record["step"] <= start_step]
        self._on_disk = found

    def rewrite(self) -> None:
        """Makes the file say what the records say, at once and whole, if it does not."""
        if self._writes and self.records != self._on_disk:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, b"".join(map(_line, self.records)))
            self._on_disk = list(self.records)

    def append(self, record: Record) -> None:
        """Adds a record, durably."""
        self.records.append(record)
        if not self._writes:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())


def read_history(path: Path) -> list[Record]:
    """The records of a file, a torn last line left out; none where there is no file.

    Raises:
      UserError: another line is not a record.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            whole = line.endswith(b"\n") and isinstance(record["step"], int)
        except (ValueError, TypeError, KeyError):
            whole = False
        if whole:
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path}:{number} is not a line of ours; remove that line or move the file away")
    return records


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
