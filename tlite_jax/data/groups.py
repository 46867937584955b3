"""The short form of a mixture: groups of buckets that do not overlap, each with a share or a number of epochs."""

from collections.abc import Sequence
from fractions import Fraction

from tlite_jax.config import MixtureGroup
from tlite_jax.data.bucket_info import BucketInfo, known_labels
from tlite_jax.data.quantities import apportion, exact, round_half_up
from tlite_jax.errors import UserError

Quotas = list[list[tuple[BucketInfo, int]]]


def group_quotas(groups: Sequence[MixtureGroup], buckets: Sequence[BucketInfo], budget: int | None) -> Quotas:
    """Rows of each bucket of each group, in whole rows whose total is exact.

    Args:
      groups: all with shares or all with epochs.
      buckets: what there is, none empty.
      budget: rows; None for groups of epochs, which make their own.

    Raises:
      UserError: as `select_buckets`.
    """
    selection = select_buckets(groups, buckets)
    if budget is None:
        epochs = [exact(group.epochs or 0.0) for group in groups]
        amounts = [passes * _rows(members) for passes, members in zip(epochs, selection, strict=True)]
        totals = [round_half_up(amount) for amount in amounts]
    else:
        shares = [exact(group.share or 0.0) for group in groups]
        amounts = [budget * share / sum(shares) for share in shares]
        totals = apportion(amounts, budget)
    result = []
    for members, amount, total in zip(selection, amounts, totals, strict=True):
        each_row: Fraction = amount / _rows(members)
        quotas = apportion([each_row * info.rows for info in members], total)
        result.append(list(zip(members, quotas, strict=True)))
    return result


def select_buckets(groups: Sequence[MixtureGroup], buckets: Sequence[BucketInfo]) -> list[list[BucketInfo]]:
    """Returns the buckets of each group, in the order given; an empty selector takes those no other group selects.

    Raises:
      UserError: a selector without buckets, a bucket in two groups, two empty selectors.
    """
    owner: dict[str, int] = {}
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
                f"the mixture's group {_shown(group)} matches no bucket; labels there are: {known_labels(buckets)}"
            )
    return result


def _rows(members: Sequence[BucketInfo]) -> int:
    return sum(info.rows for info in members)


def _shown(group: MixtureGroup) -> str:
    return "{" + ", ".join(f"{label}: {value}" for label, value in group.select.items()) + "}"
