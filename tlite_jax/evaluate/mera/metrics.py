"""Metrics of single answers and of lists of them, as MERA's scoring module computes them."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

MAX_GRADE_POINTS = 34
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def mean(values: Sequence[float]) -> float:
    """Sum over count; there is at least one value."""
    return sum(values) / len(values)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and repeated white space (SQuAD 1.1's rule)."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 if the normalised prediction is one of the normalised answers."""
    return float(any(normalize_answer(prediction) == normalize_answer(gold) for gold in golds))


def token_f1(prediction: str, golds: Sequence[str]) -> float:
    """The best F1 of word multisets over the answers; without words on either side, whether both have none."""
    return max(_token_f1(normalize_answer(prediction).split(), normalize_answer(gold).split()) for gold in golds)


def _token_f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def f1_macro(pairs: Sequence[tuple[str, str]]) -> float:
    """Unweighted mean of F1 over every label that is an answer or a prediction (scikit-learn's "macro").

    Args:
      pairs: (answer, prediction).
    """
    scores = []
    for label in sorted({label for pair in pairs for label in pair}):
        both = sum(gold == label and predicted == label for gold, predicted in pairs)
        either = sum((gold == label) + (predicted == label) for gold, predicted in pairs)
        scores.append(2 * both / either)
    return mean(scores)


def matthews(pairs: Sequence[tuple[float, float]]) -> float:
    """Matthews correlation of 0/1 answers and predictions; 0 where one of them never varies."""
    positive = Counter(pairs)
    tp, tn = positive[1.0, 1.0], positive[0.0, 0.0]
    fp, fn = positive[0.0, 1.0], positive[1.0, 0.0]
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / scale if scale else 0.0


def use_points(kind: str, id_task: str, answer: str, prediction: str) -> int:
    """Points of one exam task.

    Args:
      kind: `meta.type`: "text", "matching", or a multiple choice.
      id_task: `meta.id_task`; "16" gives points for a part.
      answer, prediction: values with commas between.
    """
    if kind == "text":
        return int(re.sub(r"[\d+\W+]", "", prediction).lower() in answer.split(","))
    right, given = answer.split(","), prediction.split(",")
    if kind == "matching":
        return sum(a == b for a, b in zip(right, given, strict=True)) if len(right) == len(given) else 0
    if id_task == "16":
        given += ["-1"] * (len(right) - len(given))
        return max(0, len(set(right) & set(given)) - len(given) + len(right))
    return int(set(right) == set(given))


def grade_norm(points: Sequence[tuple[int, int | str]]) -> float:
    """Mean over exam variants of points over the most that an exam gives.

    Args:
      points: (points, variant) of each task.
    """
    totals: dict[int | str, float] = {}
    for value, variant in points:
        totals[variant] = totals.get(variant, 0.0) + value
    return mean([total / MAX_GRADE_POINTS for total in totals.values()])


def is_solved(expected: Sequence[str], found: Sequence[str | None] | str) -> bool:
    """Whether a program gave every expected result.

    Args:
      expected: results as text.
      found: results as text, None for one that failed; or "timed out".
    """
    if isinstance(found, str) or not found or len(expected) != len(found) or found[0] is None:
        return False
    return all(a == b for a, b in zip(expected, found, strict=True))


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Chance that one of `k` programs out of `samples` is right (unbiased; arXiv:2107.03374)."""
    if samples - solved < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - solved + 1, samples + 1))
