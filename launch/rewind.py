"""`python -m launch rewind`: go back in a run, and leave batches out."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from tlite_jax.errors import UserError


def main(
    run: Annotated[Path, typer.Argument(help="A run's directory; nothing may be training it.")],
    to: Annotated[int | None, typer.Option(min=0, help="Step to go back to; default: before the skipped ones.")] = None,
    skip: Annotated[str | None, typer.Option(help="FIRST..LAST or one step: leave their batches out.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Take a run back to a checkpoint and skip batches, after a spike of the loss. `train` then goes on from there.

    Example: python -m launch rewind runs/tlite_8b/stage1 --to 1000 --skip 1203..1207
    """
    from tlite_jax.train.directory import CONFIG_FILE
    from tlite_jax.train.lock import locked
    from tlite_jax.train.rewind import rewind

    changes = not dry_run and (run / CONFIG_FILE).exists()
    with locked(run) if changes else nullcontext():
        done = rewind(run, to=to, skip=_steps(skip), dry_run=dry_run)
    if as_json:
        values = {"step": done.step, "skipped_rows": done.skipped_rows, "total_steps": done.total_steps}
        print(json.dumps({**values, "set_aside": done.set_aside, "directory": str(done.directory)}, indent=1))
        return
    tense = "would go" if dry_run else "goes"
    print(f"{run} {tense} on from its checkpoint of step {done.step} and ends after step {done.total_steps}")
    if done.skipped_rows:
        rows = ", ".join(f"{name} {count:,}" for name, count in done.skipped_rows.items())
        print(f"skipped: {sum(done.skipped_rows.values()):,} rows ({rows})")
    if done.set_aside:
        print(f"set aside in {done.directory}: checkpoints of steps {', '.join(map(str, done.set_aside))}")


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text, re.ASCII)
    if found is None:
        raise UserError(f"--skip {text} is not of the form FIRST..LAST, e.g. --skip 120..125")
    return int(found[1]), int(found[2] or found[1])
