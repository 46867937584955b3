"""Whether targets and limits can be met together, and if not, which of them exclude each other and by how much.

A linear program over cells (buckets that fulfil the same targets), in shares of the budget. The conflict that is named
is minimal: without any one of its constraints the rest of it can be met (Chinneck's deletion filter).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tlite_jax.config.pattern import matches, parse_pattern
from tlite_jax.data.bucket_info import BucketInfo
from tlite_jax.data.cells import cells_of
from tlite_jax.data.quantities import exact
from tlite_jax.errors import UserError

Floats = npt.NDArray[np.float64]

# In shares of the budget: what counts as met.
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Problem:
    """Buckets, their natural weights, targets with their members, and limits."""

    buckets: Sequence[BucketInfo]
    weights: Sequence[float]
    targets: Mapping[str, float]
    members: Sequence[Sequence[bool]]
    max_epochs: Mapping[str, float]
    budget: int

    @cached_property
    def signatures(self) -> Floats:
        """float64 [targets, cells]: 1 where a cell is in a target."""
        cells = cells_of(self.members, len(self.buckets))
        return np.array(list(cells), np.float64).reshape(len(cells), len(self.targets)).T

    def room(self, patterns: Collection[str]) -> Floats:
        """The most that each cell can give under the limits of these patterns, in shares of the budget."""
        most = np.where(np.array(self.weights) > 0, math.inf, 0.0)
        for pattern in patterns:
            terms, passes = parse_pattern(pattern), exact(self.max_epochs[pattern])
            for i, bucket in enumerate(self.buckets):
                if matches(terms, bucket.name, bucket.labels):
                    most[i] = min(most[i], int(passes * bucket.rows))
        cells = cells_of(self.members, len(self.buckets))
        return np.array([math.fsum(most[places]) for places in cells.values()]) / self.budget


def explain(problem: Problem) -> None:
    """Raises when a problem cannot be solved.

    Raises:
      UserError: naming a minimal set of constraints that exclude each other and what can be reached.
    """
    if not any(problem.weights):
        raise UserError("the mixture consumes nothing: its rates leave no bucket a weight")
    everything = float(np.sum(problem.room(problem.max_epochs)))
    if everything < 1 - _TOLERANCE:
        raise UserError(
            f"the mixture's budget is {problem.budget:,} rows, but data.mixture.max_epochs allows no more than "
            f"{round(everything * problem.budget):,}; lower tokens or epochs, raise max_epochs or add data"
        )
    if not problem.targets or _can(problem, problem.targets, problem.max_epochs):
        return
    targets, limits = _minimal_conflict(problem)
    needs = [_needs(problem, target, targets, limits) for target in targets]
    closest = ", ".join(f"{pattern} {share:.1%}" for pattern, share in _closest(problem).items())
    raise UserError(
        f"the mixture's targets cannot all be met: {'; '.join(needs)}. "
        f"The closest to all targets would be {closest}. Change a share, a rate or max_epochs, or add data"
    )


def _needs(problem: Problem, target: str, targets: list[str], limits: list[str]) -> str:
    """What one target of a conflict wants and what the rest of it leaves."""
    others = [other for other in targets if other != target]
    low, high = (_reach(problem, target, others, limits, sign) for sign in (1, -1))
    wanted = problem.targets[target]
    reachable = f"at most {high:.1%}" if wanted > high else f"at least {low:.1%}"
    conditions = [f"{other} at {problem.targets[other]:.1%}" for other in others]
    conditions += [f"max_epochs {pattern}: {problem.max_epochs[pattern]:g}" for pattern in limits]
    given = f" with {' and '.join(conditions)}" if conditions else ""
    return f"{target} needs {wanted:.1%} but can be {reachable}{given}"


def _minimal_conflict(problem: Problem) -> tuple[list[str], list[str]]:
    targets, limits = list(problem.targets), list(problem.max_epochs)
    for limit in list(limits):
        rest = [other for other in limits if other != limit]
        if not _can(problem, targets, rest):
            limits = rest
    for target in list(targets):
        rest = [other for other in targets if other != target]
        if not _can(problem, rest, limits):
            targets = rest
    return targets, limits


def _can(problem: Problem, targets: Collection[str], limits: Collection[str]) -> bool:
    return _program(problem, targets, limits, np.zeros(problem.signatures.shape[1])) is not None


def _reach(problem: Problem, target: str, others: Collection[str], limits: Collection[str], sign: int) -> float:
    """The least (sign 1) or greatest (sign -1) share of a target under other constraints."""
    row = problem.signatures[list(problem.targets).index(target)]
    found = _program(problem, others, limits, sign * row)
    assert found is not None, "a minimal conflict without one of its constraints can be met"
    return float(row @ found)


def _program(problem: Problem, targets: Collection[str], limits: Collection[str], objective: Floats) -> Floats | None:
    """Cells' shares with the least objective that meet some of the constraints; None where there are none."""
    from scipy.optimize import linprog

    wanted = [i for i, target in enumerate(problem.targets) if target in targets]
    equations = np.vstack([np.ones(problem.signatures.shape[1]), problem.signatures[wanted]])
    values = [1.0, *(problem.targets[target] for target in problem.targets if target in targets)]
    bounds = [(0, None if most == math.inf else most) for most in problem.room(limits)]
    found = linprog(objective, A_eq=equations, b_eq=values, bounds=bounds, method="highs")
    return np.asarray(found.x) if found.status == 0 else None


def _closest(problem: Problem) -> dict[str, float]:
    """Shares with the least sum of distances to all targets, under all limits."""
    from scipy.optimize import linprog

    num_targets, num_cells = problem.signatures.shape
    slack = np.vstack([np.zeros((1, 2 * num_targets)), np.hstack([np.eye(num_targets), -np.eye(num_targets)])])
    equations = np.hstack([np.vstack([np.ones(num_cells), problem.signatures]), slack])
    cost = np.concatenate([np.zeros(num_cells), np.ones(2 * num_targets)])
    bounds = [(0, None if most == math.inf else most) for most in problem.room(problem.max_epochs)]
    bounds += [(0, None)] * (2 * num_targets)
    found = linprog(cost, A_eq=equations, b_eq=[1.0, *problem.targets.values()], bounds=bounds, method="highs")
    assert found.status == 0, "deviations may be of any size"
    return dict(zip(problem.targets, problem.signatures @ found.x[:num_cells], strict=True))
