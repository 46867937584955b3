"""`python -m launch mixture`: what a mixture will consume."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launch.mixture_parts.cost import Cost
    from tlite_jax.config import RunConfig
    from tlite_jax.data.mixture import BucketInfo, Plan

HARDWARE = Path(__file__).resolve().parent.parent / "configs" / "hardware"


def main(
    config: Annotated[Path, typer.Argument(help="A run's YAML; its buckets are prepared, or declared in it.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, every bucket included.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Buckets and values of a label to show, the most used first.")] = 20,
    show_all: Annotated[bool, typer.Option("--all", help="Show every bucket and value.")] = False,
    declared: Annotated[bool, typer.Option("--declared", help="Use the declared sizes though there are buckets.")] = (
        False
    ),
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Of one device; with --devices or --hardware: days.")
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="How many.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars for a device and hour.")] = None,
    hardware: Annotated[
        str | None, typer.Option(help="A name in configs/hardware, or a YAML: devices of a node and price.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="With --hardware.")] = 1,
    replay: Annotated[int | None, typer.Option(help="List the documents of this step instead.")] = None,
    text: Annotated[bool, typer.Option("--text", help="With --replay: the beginning of each row.")] = False,
    ledger: Annotated[bool, typer.Option("--ledger", help="Show what the run has read instead, against its plan.")] = (
        False
    ),
) -> None:
    """Say what a mixture will consume: tokens, epochs and repeats of each label and bucket. Trains and writes nothing.

    With --replay and --ledger: what the run in the config's output has read.

    Example: python -m launch mixture configs/tlite_8b_stage1.yaml --tokens-per-second 3000 --devices 96 --price 2.25
    """
    from launch.mixture_parts.cost import make_cost
    from launch.mixture_parts.infos import bucket_infos
    from launch.mixture_parts.past import show_past
    from launch.mixture_parts.table import print_tables
    from tlite_jax.config_files import load_config
    from tlite_jax.data.mixture import make_plan

    run = load_config(config, overrides or ())
    if replay is not None or ledger:
        show_past(run, replay, text=text, as_json=as_json)
        return
    cost = make_cost(tokens_per_second, devices, price, hardware, nodes, HARDWARE)
    data, train = run.data, run.train
    infos = bucket_infos(run, declared=declared)
    rows = None if train.steps is None else train.steps * train.batch_size
    plan = make_plan(data.mixture, infos, seed=run.seed, sequence_length=data.sequence_length, rows=rows)
    if as_json:
        print(json.dumps(_values(run, plan, infos, cost), ensure_ascii=False, indent=1))
    else:
        print_tables(run, plan, infos, cost, top=None if show_all else top)


def _values(run: "RunConfig", plan: "Plan", infos: "Sequence[BucketInfo]", cost: "Cost | None") -> dict[str, object]:
    from tlite_jax.data.usage import label_usages, target_usages, warnings, what_if

    mixture = run.data.mixture
    usages = what_if(plan, infos, grouped=mixture.groups is not None)
    targets = target_usages(plan, mixture)
    tokens = plan.total_rows * plan.sequence_length
    return {
        "plan_hash": plan.hash,
        "rows": plan.total_rows,
        "tokens": tokens,
        "batches": plan.total_rows // run.train.batch_size,
        "days": cost and cost.days(tokens),
        "dollars": cost and cost.dollars(tokens),
        "warnings": list(warnings(usages, targets)),
        "targets": [asdict(target) for target in targets],
        "labels": [asdict(label) for label in label_usages(usages)],
        "buckets": [asdict(usage) for usage in usages],
    }
