"""The `--tasks` part of `python -m launch eval`: lm-evaluation-harness on a model."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlite_jax.errors import UserError, require

if TYPE_CHECKING:
    from tlite_jax.evaluate.harness import Progress


def evaluate_tasks(
    checkpoint: Path,
    *,
    step: int | str | None,
    dtype: str,
    batch_tokens: int | None,
    max_length: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Runs tasks and prints the harness's tables, or JSON.

    Args:
      checkpoint, step, dtype, batch_tokens, max_length: of `open_language_model`.
      as_json: print the results as one JSON object.
      options: of `evaluate.harness_run.HarnessOptions`, tasks as words with commas.
    """
    require("lm_eval", extra="eval", purpose="--tasks")
    from launch.language_model import open_language_model
    from tlite_jax.evaluate.harness import HarnessModel
    from tlite_jax.evaluate.harness_run import HarnessOptions, open_tasks, run_tasks, tables

    tasks = tuple(name.strip() for name in options.pop("tasks").split(",") if name.strip())
    if options["limit"] is not None and options["limit"] >= 1 and options["limit"] % 1:
        raise UserError(f"--limit {options['limit']}: a whole number of documents, or a share of them below 1")
    chosen = HarnessOptions(tasks=tasks, **options)
    sizes = {"batch_tokens": batch_tokens, "max_length": max_length}
    given = {name: value for name, value in sizes.items() if value is not None}
    opened = open_tasks(chosen)
    model = open_language_model(checkpoint, step=step, dtype=dtype, **given)
    name = "__".join(part for part in checkpoint.parts[-3:] if part not in ("/", "checkpoints"))
    results = run_tasks(
        HarnessModel(model, progress=_progress(), seed=chosen.seed or 0), chosen, name=name, tasks=opened
    )
    truncated = results["config"]["num_truncated"]
    if as_json:
        values = {"checkpoint": str(checkpoint), "results": results["results"], "num_truncated": truncated}
        print(json.dumps(values, ensure_ascii=False, default=str))
        return
    print(tables(results))
    if any(truncated.values()):
        print(
            f"longer than the model's context of {model.max_length}, cut at their beginning: {truncated['requests']} "
            f"requests, {truncated['prompts']} prompts"
        )
    if chosen.output is not None:
        print(f"results: {chosen.output}")


def _progress() -> "Progress | None":
    """Shows how far it is, on a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(what: str, done: int, total: int) -> None:
        print(f"\r{what}: {done:,} of {total:,}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show
