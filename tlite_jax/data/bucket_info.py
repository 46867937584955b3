"""What a mixture needs to know of buckets, and how patterns over labels select them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tlite_jax.config.pattern import matches, parse_pattern
from tlite_jax.errors import UserError


@dataclass(frozen=True)
class BucketInfo:
    """One bucket: its size in rows. `content` names its bytes, so that changed data changes the plan."""

    name: str
    labels: Mapping[str, str]
    rows: int
    content: str = ""


def selected(pattern: str, buckets: Sequence[BucketInfo], *, field: str) -> list[bool]:
    """Says for each bucket whether a pattern selects it.

    Args:
      pattern: as in a config, e.g. "source=cc, style=ads|news".
      buckets: what there is.
      field: where the pattern stands, for the error.

    Raises:
      UserError: it selects none.
    """
    terms = parse_pattern(pattern)
    result = [matches(terms, bucket.name, bucket.labels) for bucket in buckets]
    if not any(result):
        raise UserError(f"{field}: {pattern!r} matches no bucket; labels there are: {known_labels(buckets)}")
    return result


def known_labels(buckets: Sequence[BucketInfo]) -> str:
    """The labels of buckets and their values, for an error; many values are cut short."""
    values: dict[str, set[str]] = {}
    for bucket in buckets:
        for label, value in bucket.labels.items():
            values.setdefault(label, set()).add(value)
    return "; ".join(f"{label}: {_listed(sorted(known))}" for label, known in sorted(values.items()))


def _listed(values: Sequence[str], most: int = 12) -> str:
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")
