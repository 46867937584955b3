"""From weights, limits and targets to rows of each bucket: the answer nearest to the weights that meets the targets.

Of all amounts x with the right totals and below the limits, the one with the least sum of x log(x / weight) - x is
x = min(limit, weight * factor of its cell), where a cell's factor is a product of one number per target that it is in
or out of. Those numbers are found one target at a time, each exactly, until all hold (iterative proportional fitting;
Deming and Stephan, 1940; with limits, coordinate ascent on the dual). Sums are correctly rounded and nothing but
+ - * / is used, so that every machine gets the same rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from tlite_jax.data.bucket_info import BucketInfo, selected
from tlite_jax.data.cells import Signature, cells_of
from tlite_jax.data.conflict import Problem, explain
from tlite_jax.data.quantities import apportion, exact, fill
from tlite_jax.errors import UserError

Floats = npt.NDArray[np.float64]

# Of the budget: when fitting stops, what is accepted after the most rounds (a twentieth of a point), and digits of rows
# that are kept before rounding, so that 331.5 is a tie on every machine.
_CONVERGED, _ACCEPTED, _MOST_ROUNDS, _DIGITS = 1e-11, 5e-4, 3000, 6


@dataclass(frozen=True)
class Solution:
    """Rows of each bucket, and the cells of the targets."""

    quotas: list[int]
    cells: dict[Signature, list[int]]


def solve(
    buckets: Sequence[BucketInfo],
    weights: Sequence[Fraction],
    limits: Sequence[int | None],
    *,
    targets: Mapping[str, float],
    max_epochs: Mapping[str, float],
    budget: int,
) -> Solution:
    """Finds whole rows of each bucket.

    Args:
      buckets: what there is.
      weights: natural weight of each, in rows.
      limits: the most rows of each, from `max_epochs`.
      targets: pattern -> share of the budget.
      max_epochs: pattern -> passes; names a limit in an error.
      budget: rows in all.

    Returns:
      Quotas that add up to the budget; a target is off by a fraction of a row per cell.

    Raises:
      UserError: no amounts meet all of it; it names constraints that exclude each other and what can be reached.
    """
    targets = dict(sorted(targets.items()))
    members = [selected(pattern, buckets, field="data.mixture.targets") for pattern in targets]
    cells = cells_of(members, len(buckets))
    problem = Problem(buckets, [float(w) for w in weights], targets, members, max_epochs, budget)
    explain(problem)
    totals = _whole_totals(_fitted(weights, limits, cells, list(targets.values()), budget), budget)
    quotas = [0] * len(buckets)
    for (_, places), total in zip(cells.items(), totals, strict=True):
        amounts = fill([weights[i] for i in places], [limits[i] for i in places], total)
        for i, quota in zip(places, apportion(amounts, total), strict=True):
            quotas[i] = quota
    return Solution(quotas, cells)


def _whole_totals(totals: Sequence[Fraction], budget: int) -> list[int]:
    return apportion(totals, budget)


def _fitted(
    weights: Sequence[Fraction],
    limits: Sequence[int | None],
    cells: Mapping[Signature, Sequence[int]],
    shares: Sequence[float],
    budget: int,
) -> list[Fraction]:
    """Rows of each cell, not yet whole, that add up to the budget."""
    if not shares:
        return [Fraction(budget)]
    places = [i for members in cells.values() for i in members]
    cell_of = np.repeat(np.arange(len(cells)), [len(members) for members in cells.values()])
    weight = np.array([float(weights[i]) for i in places])
    limit = np.array([math.inf if limits[i] is None else float(limits[i] or 0) for i in places])
    limit[weight == 0] = 0.0
    signatures = np.array(list(cells), bool).T  # [targets, cells]
    parts = [(signatures[t] == side, budget * (s if side else 1 - s)) for t, s in enumerate(shares) for side in (1, 0)]
    factors = np.ones(len(cells))
    for _ in range(_MOST_ROUNDS):
        worst = 0.0
        for inside, wanted in parts:
            here = inside[cell_of]
            amounts, most = factors[cell_of[here]] * weight[here], limit[here]
            worst = max(worst, abs(math.fsum(np.minimum(amounts, most)) - wanted))
            factors[inside] *= _scale(amounts, most, wanted)
        if worst <= _CONVERGED * budget:
            break
    else:
        if worst > _ACCEPTED * budget:
            raise UserError(
                f"the mixture's targets can only just be met, to within {worst / budget:.2%} of the budget after "
                f"{_MOST_ROUNDS} rounds; give them some room: raise max_epochs or move a share a little"
            )
    amounts = np.minimum(factors[cell_of] * weight, limit)
    totals = [round(math.fsum(amounts[cell_of == c]), _DIGITS) for c in range(len(cells))]
    return _to_budget([exact(total) for total in totals], budget)


def _scale(amounts: Floats, limits: Floats, wanted: float) -> float:
    """The factor t with sum of min(limit, t * amount) = wanted; from below, by Newton's steps, which are exact here."""
    total = math.fsum(amounts)
    if not total or wanted <= 0:
        return 0.0
    factor = wanted / total
    for _ in range(len(amounts)):
        full = factor * amounts >= limits
        free = math.fsum(amounts[~full])
        if not free:
            break
        better = (wanted - math.fsum(limits[full])) / free
        if better <= factor:
            break
        factor = better
    return factor


def _to_budget(totals: list[Fraction], budget: int) -> list[Fraction]:
    """Puts what the last digits lack or have too much of where there is most."""
    largest = max(range(len(totals)), key=lambda c: totals[c])
    totals[largest] += budget - sum(totals)
    return totals
