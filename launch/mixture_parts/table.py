"""Tables of what a mixture will consume: totals first, then the buckets."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tlite_jax.data.usage import LabelUsage, TargetUsage, Usage, label_usages, target_usages, warnings, what_if

if TYPE_CHECKING:
    from launch.mixture_parts.cost import Cost
    from tlite_jax.config import RunConfig
    from tlite_jax.data.mixture import BucketInfo, Plan

# Tables are cut to a terminal's width; where there is none, nothing is cut.
WIDTH_OF_A_FILE = 160


def make_console() -> Console:
    """A console that does not wrap where nobody looks."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    return console


def print_tables(
    run: "RunConfig", plan: "Plan", infos: "Sequence[BucketInfo]", cost: "Cost | None", *, top: int | None
) -> None:
    """Prints targets, labels, buckets, totals and warnings.

    Args:
      run, plan, infos: the config, its plan, and the buckets that there are.
      cost: None: no days.
      top: buckets, and values of a label, at most; None: all.
    """
    console = make_console()
    mixture = run.data.mixture
    usages = what_if(plan, infos, grouped=mixture.groups is not None)
    targets = target_usages(plan, mixture)
    if targets:
        console.print(_target_table(targets, run.train.batch_size))
    if len(usages) > 1:
        console.print(_label_table(usages, plan.sequence_length, top))
    console.print(_bucket_table(usages, plan, top))
    tokens = plan.total_rows * plan.sequence_length
    batches = plan.total_rows // run.train.batch_size
    console.print(f"{batches:,} batches of {run.train.batch_size}; plan {plan.hash}", highlight=False)
    if cost is not None:
        dollars = cost.dollars(tokens)
        money = "" if dollars is None else f", {dollars:,.0f} dollars at {cost.price:g} a device and hour"
        speed = f"{cost.devices} devices at {cost.tokens_per_second:,g} tokens/s each"
        console.print(f"{speed}: {cost.days(tokens):.2f} days{money}", highlight=False)
    for line in warnings(usages, targets):
        console.print(f"warning: {line}", highlight=False, markup=False, soft_wrap=True)


def short(tokens: int) -> str:
    """A number of tokens in four digits or less: 640 B, 2.75 M, 812."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if tokens >= unit:
            value = tokens / unit
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {name}"
    return str(tokens)


def make_table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _target_table(targets: Sequence[TargetUsage], batch_size: int) -> Table:
    table = make_table(("target",), ("wanted", "planned", "any batch", "epochs"))
    for t in targets:
        off = f"±{t.batch_bound / batch_size:.2%}"
        table.add_row(t.pattern, f"{t.wanted:.2%}", f"{t.share:.2%}", off, f"{t.epochs:.3f}")
    return table


def _label_table(usages: Sequence[Usage], length: int, top: int | None) -> Table:
    table = make_table(("label", "value"), ("buckets", "tokens there", "tokens used", "epochs", "share"))
    for label, members in groupby(label_usages(usages), key=lambda u: u.label):
        values = list(members)
        for u in values[:top]:
            amounts = (f"{u.buckets:,}", short(u.rows * length), short(u.consumed_rows * length))
            table.add_row(label, u.value, *amounts, f"{u.epochs:.3f}", f"{u.share:.2%}")
        if top is not None and len(values) > top:
            table.add_row(label, *_rest(values[top:], length))
    return table


def _rest(values: Sequence[LabelUsage], length: int) -> Iterator[str]:
    rows, consumed = sum(u.rows for u in values), sum(u.consumed_rows for u in values)
    yield f"{len(values):,} more"
    yield f"{sum(u.buckets for u in values):,}"
    yield from (short(rows * length), short(consumed * length), f"{consumed / rows:.3f}")
    yield f"{sum(u.share for u in values):.2%}"


def _bucket_table(usages: Sequence[Usage], plan: "Plan", top: int | None) -> Table:
    grouped = any(u.group is not None for u in usages)
    names = ("bucket", "labels", "group") if grouped else ("bucket", "labels")
    table = make_table(names, ("rows", "used", "tokens", "epochs", "repeats", "share"))
    shown = list(usages)
    if top is not None and len(usages) > top:
        shown = sorted(usages, key=lambda u: -u.consumed_rows)[:top]
    for u in shown:
        labels = ", ".join(f"{label}: {value}" for label, value in u.labels.items())
        group = ["unused" if u.group is None else str(u.group + 1)] if grouped else []
        amounts = (f"{u.rows:,}", f"{u.consumed_rows:,}", f"{u.consumed_tokens:,}")
        table.add_row(u.name, labels, *group, *amounts, f"{u.epochs:.3f}", str(u.max_repeats), f"{u.share:.2%}")
    if len(shown) < len(usages):
        table.add_row(f"{len(usages) - len(shown):,} more (--all shows them)")
    table.add_section()
    tokens = plan.total_rows * plan.sequence_length
    empty = [""] * (len(names) - 1)
    table.add_row("total", *empty, f"{sum(u.rows for u in usages):,}", f"{plan.total_rows:,}", f"{tokens:,}")
    return table
