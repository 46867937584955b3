"""The best step of a run, by what its evaluations wrote down: `evaluation/board.jsonl`, a line for each.

A line's `objective` is the weighted sum that `evaluation.best` asks for, the smaller the better; null without one.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

BOARD_FILE = Path("evaluation") / "board.jsonl"


def best_step(records: Iterable[Mapping[str, Any]], steps: Collection[int]) -> int | None:
    """The step of `steps` with the smallest objective, the earliest of equals; None where none has one."""
    scored = {record["step"]: record["objective"] for record in records if record.get("objective") is not None}
    known = [step for step in sorted(steps) if step in scored]
    return min(known, key=lambda step: scored[step], default=None)


def best_step_on_disk(run: Path, steps: Collection[int]) -> int | None:
    """`best_step` by the board of a run directory; None without a board."""
    file = run / BOARD_FILE
    if not file.exists():
        return None
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # torn by a crash
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return best_step(records, steps)
