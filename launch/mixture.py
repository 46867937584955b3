"""`python -m launch mixture`: what a mixture will consume."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tlite_jax.config import RunConfig
    from tlite_jax.data.mixture import Plan, Usage

# Tables are cut to a terminal's width; where there is none, nothing is cut.
WIDTH_OF_A_FILE = 160


def main(
    config: Annotated[Path, typer.Argument(help="A run's YAML; its buckets are prepared.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a mixture will consume: rows, tokens, epochs and repeats of each bucket. Trains and writes nothing.

    Example: python -m launch mixture configs/tiny.yaml train.steps=2000
    """
    from tlite_jax.config_files import load_config
    from tlite_jax.data.buckets import BucketStore
    from tlite_jax.data.mixture import make_plan, what_if

    run = load_config(config, overrides or ())
    data, train = run.data, run.train
    infos = BucketStore.open(data.buckets).infos()
    rows = None if train.steps is None else train.steps * train.batch_size
    plan = make_plan(data.mixture, infos, seed=run.seed, sequence_length=data.sequence_length, rows=rows)
    usages = what_if(plan, infos)
    if as_json:
        print(json.dumps(_values(run, plan, usages), ensure_ascii=False, indent=1))
    else:
        _print(run, plan, usages)


def _values(run: "RunConfig", plan: "Plan", usages: "Sequence[Usage]") -> dict[str, object]:
    return {
        "plan_hash": plan.hash,
        "rows": plan.total_rows,
        "tokens": plan.total_rows * plan.sequence_length,
        "batches": plan.total_rows // run.train.batch_size,
        "buckets": [asdict(usage) for usage in usages],
    }


def _print(run: "RunConfig", plan: "Plan", usages: "Sequence[Usage]") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("bucket", "labels", "group"):
        table.add_column(name, overflow="fold")
    for name in ("rows", "used", "tokens", "epochs", "repeats", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for u in usages:
        labels = ", ".join(f"{label}: {value}" for label, value in u.labels.items())
        group = "unused" if u.group is None else str(u.group + 1)
        amounts = (f"{u.rows:,}", f"{u.consumed_rows:,}", f"{u.consumed_tokens:,}")
        table.add_row(u.name, labels, group, *amounts, f"{u.epochs:.3f}", str(u.max_repeats), f"{u.share:.2%}")
    table.add_section()
    tokens = plan.total_rows * plan.sequence_length
    table.add_row("total", "", "", f"{sum(u.rows for u in usages):,}", f"{plan.total_rows:,}", f"{tokens:,}")
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    console.print(table)
    batches = plan.total_rows // run.train.batch_size
    console.print(f"{batches:,} batches of {run.train.batch_size}; plan {plan.hash}", highlight=False)
