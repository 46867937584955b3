"""From a mixture's groups to exact integer quotas per bucket: pure, no files, no jax."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from tlite_jax.config import MixtureConfig, MixtureGroup
from tlite_jax.data.order import Plan, PlannedBucket, Segment
from tlite_jax.errors import UserError

__all__ = ["BucketInfo", "Plan", "PlannedBucket", "Segment", "Usage", "make_plan", "select_buckets", "what_if"]


@dataclass(frozen=True)
class BucketInfo:
    """What a mixture needs to know of a bucket. `content` names its bytes, so that changed data changes the plan."""

    name: str
    labels: Mapping[str, str]
    rows: int
    content: str = ""


@dataclass(frozen=True)
class Usage:
    """What a plan makes of one bucket; `group` is None for an unused one."""

    name: str
    labels: Mapping[str, str]
    group: int | None
    rows: int
    consumed_rows: int
    consumed_tokens: int
    epochs: float
    max_repeats: int
    share: float


def make_plan(
    mixture: MixtureConfig,
    buckets: Sequence[BucketInfo],
    *,
    seed: int,
    sequence_length: int,
    rows: int | None,
) -> Plan:
    """Turns shares or epochs into the exact order of a stage.

    Args:
      mixture: groups, each with a share of the budget or a number of epochs.
      buckets: what there is.
      seed: decides the shuffles.
      sequence_length: tokens in a row.
      rows: the budget in rows (train.steps * train.batch_size) for shares without `mixture.tokens`; else ignored.

    Returns:
      The plan; buckets without a quota are left out. Quotas are integers whose total is exact (largest remainder).

    Raises:
      UserError: a selector without buckets, a bucket in two groups, no budget, nothing to consume.
    """
    selected = select_buckets(mixture.groups, buckets)
    if mixture.groups[0].share is None:
        epochs = [exact(group.epochs or 0.0) for group in mixture.groups]
        amounts = [passes * _rows(members) for passes, members in zip(epochs, selected, strict=True)]
        totals = [_round(amount) for amount in amounts]
    else:
        budget = rows if mixture.tokens is None else mixture.tokens // sequence_length
        if budget is None:
            raise UserError("the mixture's shares need a budget: set data.mixture.tokens or train.steps")
        if budget < 1:
            raise UserError(f"data.mixture.tokens {mixture.tokens} is less than a row of {sequence_length} tokens")
        shares = [exact(group.share or 0.0) for group in mixture.groups]
        amounts = [budget * share / sum(shares) for share in shares]
        totals = apportion(amounts, budget)
    groups = []
    for members, amount, total in zip(selected, amounts, totals, strict=True):
        each_row = amount / _rows(members)
        quotas = apportion([each_row * info.rows for info in members], total)
        planned = [
            PlannedBucket(info.name, dict(info.labels), info.rows, quota, info.content)
            for info, quota in zip(members, quotas, strict=True)
            if quota
        ]
        if planned:
            groups.append(tuple(planned))
    if not groups:
        raise UserError("the mixture consumes nothing: every share or number of epochs rounds to no rows")
    return Plan(tuple(groups), seed, sequence_length)


def select_buckets(groups: Sequence[MixtureGroup], buckets: Sequence[BucketInfo]) -> list[list[BucketInfo]]:
    """Returns the buckets of each group, in the order given; an empty selector takes those no other group selects.

    Raises:
      UserError: a selector without buckets, a bucket in two groups, two empty selectors.
    """
    owner: dict[str, int] = {}
    buckets = [bucket for bucket in buckets if bucket.rows]
    if not buckets:
        raise UserError("there are no rows to train on: every bucket is empty or held out")
    for number, group in enumerate(groups):
        if not group.select:
            continue
        for bucket in buckets:
            if all(bucket.labels.get(label) == value for label, value in group.select.items()):
                if bucket.name in owner:
                    both = f"{_shown(groups[owner[bucket.name]])} and {_shown(group)}"
                    raise UserError(f"bucket {bucket.name} is in two groups of the mixture, {both}; narrow one of them")
                owner[bucket.name] = number
    rest = [number for number, group in enumerate(groups) if not group.select]
    if len(rest) > 1:
        raise UserError("two groups of the mixture select {}; only one can take the remaining buckets")
    if rest:
        owner = {bucket.name: owner.get(bucket.name, rest[0]) for bucket in buckets}
    result: list[list[BucketInfo]] = [[] for _ in groups]
    for bucket in buckets:
        if bucket.name in owner:
            result[owner[bucket.name]].append(bucket)
    for group, members in zip(groups, result, strict=True):
        if not members:
            raise UserError(
                f"the mixture's group {_shown(group)} matches no bucket; labels there are: {_known(buckets)}"
            )
    return result


def what_if(plan: Plan, buckets: Sequence[BucketInfo]) -> list[Usage]:
    """Says what a plan consumes of each bucket, the unused ones included, in the plan's order."""
    total = plan.total_rows
    result = []
    for number, group in enumerate(plan.groups):
        for b in group:
            tokens, repeats = b.quota * plan.sequence_length, -(-b.quota // b.rows)
            result.append(
                Usage(b.name, b.labels, number, b.rows, b.quota, tokens, b.quota / b.rows, repeats, b.quota / total)
            )
    used = {usage.name for usage in result}
    result += [Usage(b.name, b.labels, None, b.rows, 0, 0, 0.0, 0, 0.0) for b in buckets if b.name not in used]
    return result


def exact(number: float) -> Fraction:
    """The fraction that a decimal number means as written: 0.3 is 3/10, not its nearest binary float."""
    return Fraction(repr(number))


def apportion(amounts: Sequence[Fraction], total: int) -> list[int]:
    """Rounds amounts to integers that add up to `total` by largest remainder; ties go to the earlier one.

    Args:
      amounts: non-negative, adding up to within 1 of `total` from either side.
      total: what the results add up to.

    Returns:
      One integer per amount, its floor or its ceiling.
    """
    result = [int(amount) for amount in amounts]
    missing = total - sum(result)
    assert 0 <= missing <= len(result), "amounts do not add up to the total"
    by_remainder = sorted(range(len(result)), key=lambda i: (result[i] - amounts[i], i))
    for i in by_remainder[:missing]:
        result[i] += 1
    return result


def _round(amount: Fraction) -> int:
    """To nearest, halves up."""
    return int(amount + Fraction(1, 2))


def _rows(buckets: Sequence[BucketInfo]) -> int:
    return sum(bucket.rows for bucket in buckets)


def _shown(group: MixtureGroup) -> str:
    return "{" + ", ".join(f"{label}: {value}" for label, value in group.select.items()) + "}"


def _known(buckets: Sequence[BucketInfo]) -> str:
    values: dict[str, set[str]] = {}
    for bucket in buckets:
        for label, value in bucket.labels.items():
            values.setdefault(label, set()).add(value)
    shown = []
    for label, names in values.items():
        some = sorted(names)
        shown.append(f"{label}: {', '.join(some[:8])}" + (f" and {len(some) - 8} more" if len(some) > 8 else ""))
    return "; ".join(shown)
