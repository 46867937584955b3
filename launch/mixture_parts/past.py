"""Printing what a run has read."""

import json
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.config import RunConfig


def show_past(run: "RunConfig", step: int | None, *, text: bool, as_json: bool) -> None:
    """Prints the documents of a step, or without one the ledger.

    Raises:
      UserError: no such step, no run, or a ledger that is not what the segments say.
    """
    from launch.mixture_parts.replay import ledger, replay

    if step is not None:
        rows = list(replay(run, step, text=text))
        if as_json:
            print(json.dumps({"step": step, "rows": rows}, ensure_ascii=False, indent=1))
        else:
            _print_rows(rows)
        return
    values = ledger(run.output)
    if as_json:
        print(json.dumps(values, ensure_ascii=False, indent=1))
    else:
        _print_ledger(values)
    if not values["agrees"]:
        raise UserError(f"the ledger of {run.output} at step {values['step']} is not what its segments say")


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from launch.mixture_parts.table import make_console, make_table

    table = make_table(("slot", "bucket"), ("pass", "row", "documents", "begin at"))
    if rows and "text" in rows[0]:
        table.add_column("text", no_wrap=True)
    for row in rows:
        first, last = row["documents"]
        documents = f"{first:,}" if first == last else f"{first:,}..{last:,}"
        starts = ", ".join(map(str, row["starts"][:4])) + (" ..." if len(row["starts"]) > 4 else "")
        extra = [escape(row["text"])] if "text" in row else []
        table.add_row(str(row["slot"]), row["bucket"], str(row["pass"]), f"{row['row']:,}", documents, starts, *extra)
    make_console().print(table)


def _print_ledger(values: dict[str, Any]) -> None:
    from launch.mixture_parts.table import make_console, make_table

    table = make_table(("bucket",), ("rows", "trained", "plan", "skipped", "epochs", "share"))
    for bucket in values["buckets"]:
        amounts = [f"{bucket[name]:,}" for name in ("rows", "trained_rows", "planned_rows", "skipped_rows")]
        table.add_row(
            bucket["name"], *amounts, f"{bucket['trained_rows'] / max(bucket['rows'], 1):.3f}", f"{bucket['share']:.2%}"
        )
    console = make_console()
    console.print(table)
    step, rows, total = values["step"], values["rows"], values["of_rows"]
    console.print(f"step {step:,}: {rows:,} of {total:,} rows", highlight=False)
    for segment in values["segments"]:
        start, plan, place = segment["start_row"], segment["plan_hash"], segment["plan_row"]
        console.print(f"from row {start:,}: plan {plan}, its row {place:,} and on", highlight=False)
    if values["agrees"]:
        console.print("the ledger equals the plan's closed form")
