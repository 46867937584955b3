"""What an evaluation tells a run: numbers for the files, a table for people, and whether to keep or to stop."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Plain text in columns, the first a name and the others numbers; below them alerts, then notes."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    alerts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Aligned lines without colour."""
        widths = [max(len(cell) for cell in column) for column in zip(self.header, *self.rows, strict=True)]
        result = []
        for row in (self.header, *self.rows):
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            result.append("  ".join(cells).rstrip())
        return [*result, *self.alerts, *self.notes]


@dataclass(frozen=True)
class Evaluated:
    """The outcome of an evaluation.

    Attributes:
      metrics: name -> value, for JSONL and TensorBoard.
      table: for the console; None: the metrics are shown as a line.
      texts: name -> text, for the console and TensorBoard.
      improved: whether this step is the best so far, and its checkpoint is to be kept.
      stop: why the run is to end here; None: it goes on.
    """

    metrics: Mapping[str, float]
    table: Table | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    improved: bool = False
    stop: str | None = None
