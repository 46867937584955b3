"""What a plan makes of its buckets, labels and targets, and what is worth a warning."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tlite_jax.config import MixtureConfig
from tlite_jax.config.pattern import matches, parse_pattern
from tlite_jax.data.bucket_info import BucketInfo
from tlite_jax.data.order import Plan

# Passes over the same text after which more of them teach little (Muennighoff et al., 2023, arXiv:2305.16264).
MANY_REPEATS = 4


@dataclass(frozen=True)
class Usage:
    """What a plan makes of one bucket; `group` is None for an unused one and where the mixture has no groups."""

    name: str
    labels: Mapping[str, str]
    group: int | None
    rows: int
    consumed_rows: int
    consumed_tokens: int
    epochs: float
    max_repeats: int
    share: float


@dataclass(frozen=True)
class TargetUsage:
    """A target and what a plan makes of it; `batch_bound`: rows by which any run of rows can differ, at most."""

    pattern: str
    wanted: float
    share: float
    batch_bound: float
    epochs: float


@dataclass(frozen=True)
class LabelUsage:
    """All buckets that have one value of a label."""

    label: str
    value: str
    buckets: int
    rows: int
    consumed_rows: int
    epochs: float
    share: float


def what_if(plan: Plan, buckets: Sequence[BucketInfo], *, grouped: bool = True) -> list[Usage]:
    """Says what a plan consumes of each bucket, the unused ones included, in the plan's order.

    Args:
      plan, buckets: what it was made from.
      grouped: whether the mixture has groups, so that a bucket's is of interest.
    """
    total = plan.total_rows
    result = []
    for number, group in enumerate(plan.groups):
        assert isinstance(group, tuple)
        for b in Plan(group, plan.seed, plan.sequence_length).buckets:
            tokens, repeats = b.quota * plan.sequence_length, -(-b.quota // b.rows)
            own = number if grouped else None
            result.append(
                Usage(b.name, b.labels, own, b.rows, b.quota, tokens, b.quota / b.rows, repeats, b.quota / total)
            )
    used = {usage.name for usage in result}
    result += [Usage(b.name, b.labels, None, b.rows, 0, 0, 0.0, 0, 0.0) for b in buckets if b.name not in used]
    return result


def target_usages(plan: Plan, mixture: MixtureConfig) -> list[TargetUsage]:
    """Says how a plan meets the targets of its mixture, or the shares of its groups."""
    wanted, patterns = dict(mixture.targets), {pattern: parse_pattern(pattern) for pattern in mixture.targets}
    for group in mixture.groups or ():
        if group.share is not None and group.select:
            name = ", ".join(f"{label}={value}" for label, value in group.select.items())
            wanted[name], patterns[name] = group.share, {label: (v,) for label, v in group.select.items()}
    members = [[matches(terms, b.name, b.labels) for b in plan.buckets] for terms in patterns.values()]
    result = []
    for pattern, hits, bound in zip(patterns, members, plan.run_bounds(members), strict=True):
        mine = [bucket for bucket, hit in zip(plan.buckets, hits, strict=True) if hit]
        rows, distinct = sum(b.quota for b in mine), sum(b.rows for b in mine)
        share, epochs = rows / plan.total_rows, rows / distinct if mine else 0.0
        result.append(TargetUsage(pattern, wanted[pattern], share, float(bound), epochs))
    return result


def label_usages(usages: Sequence[Usage]) -> list[LabelUsage]:
    """Totals of every value of every label, the largest first within its label."""
    found: dict[tuple[str, str], list[Usage]] = {}
    for usage in usages:
        for label, value in usage.labels.items():
            found.setdefault((label, value), []).append(usage)
    result = []
    for (label, value), mine in found.items():
        rows, consumed = sum(u.rows for u in mine), sum(u.consumed_rows for u in mine)
        share = sum(u.share for u in mine)
        result.append(LabelUsage(label, value, len(mine), rows, consumed, consumed / rows, share))
    order = list(dict.fromkeys(label for label, _ in found))
    return sorted(result, key=lambda u: (order.index(u.label), -u.consumed_rows, u.value))


def warnings(usages: Sequence[Usage], targets: Sequence[TargetUsage]) -> Iterator[str]:
    """Yields a line for each thing that a user should know before the run."""
    often = sorted((u for u in usages if u.epochs > MANY_REPEATS), key=lambda u: -u.epochs)
    if often:
        worst = ", ".join(f"{u.name} ({u.epochs:.1f})" for u in often[:3])
        yield f"{_count(often)} read more than {MANY_REPEATS} times: {worst}{_more(often)}"
    for target in targets:
        if target.epochs > 1:
            yield f"{target.pattern} reaches {target.share:.1%} only by repetition: {target.epochs:.2f} passes over it"
    unused = [u for u in usages if not u.consumed_rows]
    if unused:
        yield f"{_count(unused)} not read at all: {', '.join(u.name for u in unused[:3])}{_more(unused)}"


def _count(usages: Sequence[Usage]) -> str:
    return f"{len(usages)} bucket{'s are' if len(usages) > 1 else ' is'}"


def _more(usages: Sequence[Usage], shown: int = 3) -> str:
    return f" and {len(usages) - shown} more" if len(usages) > shown else ""
