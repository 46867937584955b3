"""Patterns over labels, as configs write them: `language=ru`, `source=cc, style=ads|news`, or `all`."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

ALL = "all"
# The label that every bucket has: its own name.
BUCKET = "bucket"


def parse_pattern(text: str) -> dict[str, tuple[str, ...]]:
    """Reads a pattern.

    Args:
      text: `all`, or terms `label=value` joined by commas; `label=one|two` allows several values.

    Returns:
      Label -> the values that it may have; empty for `all`.

    Raises:
      ValueError: a term without a label or a value, or a label named twice.
    """
    result: dict[str, tuple[str, ...]] = {}
    if text.strip() == ALL:
        return result
    for term in text.split(","):
        label, separator, values = (part.strip() for part in term.partition("="))
        allowed = tuple(sorted({value.strip() for value in values.split("|")}))
        if not separator or not label or not all(allowed):
            raise ValueError(f"{text!r} is no pattern: write {ALL}, label=value or label=value, label=this|that")
        if label in result:
            raise ValueError(f"{text!r} names {label} twice; write {label}=this|that for either")
        result[label] = allowed
    return result


def canonical_pattern(text: str) -> str:
    """The one spelling of a pattern: terms and values sorted."""
    terms = [f"{label}={'|'.join(values)}" for label, values in sorted(parse_pattern(text).items())]
    return ", ".join(terms) or ALL


def matches(pattern: Mapping[str, tuple[str, ...]], name: str, labels: Mapping[str, str]) -> bool:
    """Whether a bucket of this name and these labels has one of the values allowed for each of a pattern's labels."""
    return all((name if label == BUCKET else labels.get(label)) in values for label, values in pattern.items())


def _no_pattern_twice(value: Any) -> Any:
    if isinstance(value, dict):
        seen: dict[str, str] = {}
        for key in value:
            if isinstance(key, str):
                spelling = canonical_pattern(key)
                if spelling in seen:
                    raise ValueError(f"{seen[spelling]!r} and {key!r} are the same pattern; leave one out")
                seen[spelling] = key
    return value


PatternKey = Annotated[str, AfterValidator(canonical_pattern)]
OncePerPattern = BeforeValidator(_no_pattern_twice)
