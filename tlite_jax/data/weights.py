"""Natural weights of buckets: their rows, times the rates that match, evened out where asked; and their limits."""

from collections.abc import Sequence
from fractions import Fraction

from tlite_jax.config import BalanceConfig, MixtureConfig
from tlite_jax.data.bucket_info import BucketInfo, selected
from tlite_jax.data.quantities import exact
from tlite_jax.errors import UserError

# Powers differ in the last bit between machines; rounded to this many digits they do not, and plans agree.
_POWER_DIGITS = 12


def natural_weights(mixture: MixtureConfig, buckets: Sequence[BucketInfo]) -> list[Fraction]:
    """Rows of each bucket x every rate that matches it, then the balances, in the order of their patterns.

    Raises:
      UserError: a pattern without buckets, or a bucket without the label to balance by.
    """
    weights = [Fraction(bucket.rows) for bucket in buckets]
    for pattern, rate in sorted(mixture.rates.items()):
        factor = exact(rate)
        for i, hit in enumerate(selected(pattern, buckets, field="data.mixture.rates")):
            if hit:
                weights[i] *= factor
    for pattern, balance in sorted(mixture.balance.items()):
        _even_out(weights, buckets, pattern, balance)
    return weights


def limits(patterns: dict[str, float], buckets: Sequence[BucketInfo]) -> list[int | None]:
    """The most rows that each bucket may give: the least of the `max_epochs` that match; None where none does."""
    result: list[int | None] = [None] * len(buckets)
    for pattern, passes in sorted(patterns.items()):
        for i, hit in enumerate(selected(pattern, buckets, field="data.mixture.max_epochs")):
            if hit:
                most = int(exact(passes) * buckets[i].rows)
                known = result[i]
                result[i] = most if known is None else min(known, most)
    return result


def _even_out(weights: list[Fraction], buckets: Sequence[BucketInfo], pattern: str, balance: BalanceConfig) -> None:
    """Makes the weight of each value of a label proportional to a power of it; the sum over the values stays."""
    members: dict[str, list[int]] = {}
    for i, hit in enumerate(selected(pattern, buckets, field="data.mixture.balance")):
        if hit and weights[i]:
            if balance.by not in buckets[i].labels:
                raise UserError(
                    f"data.mixture.balance: {pattern!r} is balanced by {balance.by}, a label that bucket "
                    f"{buckets[i].name} does not have; narrow the pattern or prepare with that label"
                )
            members.setdefault(buckets[i].labels[balance.by], []).append(i)
    natural = {value: sum((weights[i] for i in places), Fraction(0)) for value, places in members.items()}
    for value, factor in balance_factors(natural, balance).items():
        for i in members[value]:
            weights[i] *= factor


def balance_factors(natural: dict[str, Fraction], balance: BalanceConfig) -> dict[str, Fraction]:
    """What each value's weight is multiplied by, so that it becomes min(max_rate * n, t * n ** alpha), the sum kept.

    Args:
      natural: value -> its weight n, positive.
      balance: alpha and max_rate.
    """
    powers = {v: exact(float(f"{float(n) ** balance.alpha:.{_POWER_DIGITS}g}")) for v, n in natural.items()}
    rest, weight = sum(natural.values(), Fraction(0)), sum(powers.values(), Fraction(0))
    factors: dict[str, Fraction] = {}
    if balance.max_rate is not None:
        most = exact(balance.max_rate)
        for value in sorted(natural, key=lambda v: (most * natural[v] / powers[v], v)):
            if most * natural[value] * weight > rest * powers[value]:
                break
            factors[value] = most
            rest, weight = rest - most * natural[value], weight - powers[value]
    return {v: factors[v] if v in factors else rest * powers[v] / (weight * natural[v]) for v in natural}
