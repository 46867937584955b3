"""From a mixture to the exact order of a stage: pure, no files, no jax."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from tlite_jax.config import MixtureConfig
from tlite_jax.data.bucket_info import BucketInfo
from tlite_jax.data.cells import Pair, Signature, arrange
from tlite_jax.data.groups import group_quotas
from tlite_jax.data.order import Nested, Plan, PlannedBucket
from tlite_jax.data.quantities import exact, round_half_up
from tlite_jax.data.solve import Solution, solve
from tlite_jax.data.weights import limits, natural_weights
from tlite_jax.errors import UserError

__all__ = ["BucketInfo", "Plan", "PlannedBucket", "make_plan"]


def make_plan(
    mixture: MixtureConfig,
    buckets: Sequence[BucketInfo],
    *,
    seed: int,
    sequence_length: int,
    rows: int | None,
    reached: Mapping[str, int] | None = None,
) -> Plan:
    """Turns a mixture into the exact order of a stage.

    Args:
      mixture: budget, rates, balances, limits and targets; or groups, each with a share or a number of epochs.
      buckets: what there is.
      seed: decides the shuffles.
      sequence_length: tokens in a row.
      rows: the budget in rows (train.steps * train.batch_size) for shares without a budget of their own; else ignored.
      reached: bucket name -> rows of its passes that earlier segments of the run have used up; it goes on after them.

    Returns:
      The plan; buckets without a quota are left out. Quotas are integers whose total is exact (largest remainder).

    Raises:
      UserError: a pattern without buckets, a bucket in two groups, no budget, nothing to consume, or targets and
        limits that exclude each other.
    """
    buckets = [bucket for bucket in buckets if bucket.rows]
    if not buckets:
        raise UserError("there are no rows to train on: every bucket is empty or held out")
    starts = reached or {}

    def planned(info: BucketInfo, quota: int) -> PlannedBucket:
        start = starts.get(info.name) or 0
        return PlannedBucket(info.name, dict(info.labels), info.rows, quota, info.content, start)

    groups: list[Nested] = []
    if mixture.groups is not None:
        budget = _budget(mixture, rows, sequence_length) if mixture.groups[0].share is not None else None
        quotas = group_quotas(mixture.groups, buckets, budget)
        members = (tuple(planned(info, quota) for info, quota in group if quota) for group in quotas)
        groups = [group for group in members if group]
    else:
        solution = _solved(mixture, buckets, rows, sequence_length)
        pairs = zip(buckets, solution.quotas, strict=True)
        groups = list(_nested(solution, [planned(info, quota) if quota else None for info, quota in pairs]))
    if not groups:
        raise UserError("the mixture consumes nothing: every share or number of epochs rounds to no rows")
    return Plan(tuple(groups), seed, sequence_length)


def _solved(mixture: MixtureConfig, buckets: Sequence[BucketInfo], rows: int | None, sequence_length: int) -> Solution:
    weights = natural_weights(mixture, buckets)
    if mixture.tokens is None and (mixture.epochs is not None or not mixture.targets):
        budget = round_half_up(exact(mixture.epochs or 1.0) * sum(weights, Fraction(0)))
    else:
        budget = _budget(mixture, rows, sequence_length)
    if not budget:
        raise UserError("the mixture consumes nothing: its epochs and rates round to no rows")
    return solve(
        buckets,
        weights,
        limits(mixture.max_epochs, buckets),
        targets=mixture.targets,
        max_epochs=mixture.max_epochs,
        budget=budget,
    )


def _budget(mixture: MixtureConfig, rows: int | None, sequence_length: int) -> int:
    budget = rows if mixture.tokens is None else mixture.tokens // sequence_length
    if budget is None:
        raise UserError("the mixture's shares need a budget: set data.mixture.tokens or train.steps")
    if budget < 1:
        raise UserError(f"data.mixture.tokens {mixture.tokens} is less than a row of {sequence_length} tokens")
    return budget


def _nested(solution: Solution, planned: Sequence[PlannedBucket | None]) -> tuple[Nested, ...]:
    """The cells of targets, nested so that targets hold in every batch, with their buckets inside."""
    inside: dict[Signature, tuple[PlannedBucket, ...]] = {}
    for signature, places in solution.cells.items():
        if members := tuple(bucket for i in places if (bucket := planned[i]) is not None):
            inside[signature] = members

    def build(node: Signature | Pair) -> tuple[Nested, ...]:
        return (build(node.left), build(node.right)) if isinstance(node, Pair) else inside[node]

    if not inside:
        return ()
    top = build(arrange({signature: sum(b.quota for b in members) for signature, members in inside.items()}))
    return top if len(inside) > 1 else (top,)
