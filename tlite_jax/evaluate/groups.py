"""Which held-out buckets a label, a watch or an objective speaks of."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tlite_jax.data.buckets import HeldOutBucket
from tlite_jax.errors import UserError


class Group(NamedTuple):
    """Buckets whose documents are scored as one."""

    name: str
    members: tuple[str, ...]


def name_of(select: Mapping[str, str]) -> str:
    """Such as language=en,domain=code; all where nothing is asked for."""
    return ",".join(f"{label}={value}" for label, value in select.items()) or "all"


def matching(select: Mapping[str, str], buckets: Sequence[HeldOutBucket]) -> list[HeldOutBucket]:
    """The buckets that carry all of the labels."""
    return [bucket for bucket in buckets if select.items() <= bucket.labels.items()]


def group_of(select: Mapping[str, str], buckets: Sequence[HeldOutBucket], field: str) -> Group:
    """The buckets that carry all of the labels and are trained on, or, where none is, those that never are.

    Args:
      select: label -> value; {}: all.
      buckets: with held-out documents.
      field: of the config, to name in an error.

    Raises:
      UserError: no bucket carries them; names the labels that there are.
    """
    found = matching(select, buckets)
    if not found:
        raise UserError(f"{field} {name_of(select)} matches no held-out bucket; {_known(buckets)}")
    trained = [bucket for bucket in found if not bucket.never_trained]
    return Group(name_of(select), tuple(bucket.name for bucket in trained or found))


def label_groups(buckets: Sequence[HeldOutBucket]) -> list[Group]:
    """A group for every value of every label, labels in the buckets' order, values sorted."""
    labels = dict.fromkeys(label for bucket in buckets for label in bucket.labels)
    return [
        group_of({label: value}, buckets, "label")
        for label in labels
        for value in sorted({bucket.labels[label] for bucket in buckets if label in bucket.labels})
    ]


def _known(buckets: Sequence[HeldOutBucket]) -> str:
    if not buckets:
        return "the buckets hold no held-out documents: set data.prepare.held_out.fraction and prepare again"
    values: dict[str, set[str]] = {}
    for bucket in buckets:
        for label, value in bucket.labels.items():
            values.setdefault(label, set()).add(value)
    shown = [
        f"{label}={'|'.join(sorted(names)[:8])}{'|...' if len(names) > 8 else ''}" for label, names in values.items()
    ]
    return f"there are {', '.join(shown) or 'no labels'}"
