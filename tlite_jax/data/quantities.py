"""Exact amounts: decimals as written, whole rows by largest remainder, and filling up to limits."""

from collections.abc import Sequence
from fractions import Fraction


def exact(number: float) -> Fraction:
    """The fraction that a decimal number means as written: 0.3 is 3/10, not its nearest binary float."""
    return Fraction(repr(number))


def round_half_up(amount: Fraction) -> int:
    """Rounds to the nearest integer, halves up."""
    return int(amount + Fraction(1, 2))


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


def fill(weights: Sequence[Fraction], limits: Sequence[int | None], total: int) -> list[Fraction]:
    """Spreads a total in proportion to weights, none above its limit: what limits take away goes to the others.

    Args:
      weights: non-negative.
      limits: the most that each can have; None: no limit.
      total: what the results add up to; at most the sum of the limits of those with a weight.

    Returns:
      min(limit, t * weight) for the one t that gives the total.
    """
    amounts = [Fraction(0)] * len(weights)
    rest, weight = Fraction(total), sum(weights, Fraction(0))
    limited = [
        (Fraction(limit) / w, i)
        for i, (limit, w) in enumerate(zip(limits, weights, strict=True))
        if w and limit is not None
    ]
    full = set()
    for ratio, i in sorted(limited):
        if ratio * weight > rest:
            break
        full.add(i)
        amounts[i] = ratio * weights[i]
        rest, weight = rest - amounts[i], weight - weights[i]
    assert weight or not rest, "more than the limits allow"
    for i, w in enumerate(weights):
        if w and i not in full:
            amounts[i] = rest * w / weight
    return amounts
