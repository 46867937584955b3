"""What a run reads, from its first row to its last: plans, one after another."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """From global row `start_row` on, rows come from the plan with this hash. A checkpoint keeps the list."""

    start_row: int
    plan_hash: str
