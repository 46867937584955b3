"""Training a text classifier and saying how well it does on documents that it has not seen.

The split, the order and the training depend on the documents' texts only: the same documents give the same model.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tlite_jax.data.labels.model import PURPOSE, Features, TextModel
from tlite_jax.errors import UserError, require

_PASSES = 20


@dataclass(frozen=True)
class ClassScore:
    """How one class does on held-out documents."""

    name: str
    documents: int
    precision: float
    recall: float


@dataclass(frozen=True)
class Evaluation:
    """How a model does on held-out documents. `confusions`: (true, taken for, documents), the most frequent first."""

    documents: int
    accuracy: float
    most_frequent_class: float
    classes: tuple[ClassScore, ...]
    confusions: tuple[tuple[str, str, int], ...]


def train(
    documents: Iterable[tuple[str, str]], label: str, *, held_out: float, features: Features, max_documents: int
) -> tuple[TextModel, Evaluation]:
    """Trains a linear classifier on hashed character n-grams.

    Args:
      documents: (text, class) pairs.
      label: the name of the label.
      held_out: the share of documents that is set aside and scored.
      features: how texts become numbers.
      max_documents: of more, those whose texts have the smallest hashes are used.

    Returns:
      The model, trained without the held-out documents, and its score on them.

    Raises:
      UserError: fewer than two classes, or a class without documents on both sides of the split.
    """
    chosen = _choose(documents, max_documents)
    aside = [number for number, (key, _, _) in enumerate(chosen) if key < held_out * 2**64]
    inside = sorted(set(range(len(chosen))) - set(aside))
    classes = sorted({name for _, _, name in chosen})
    _check(chosen, aside, inside, classes, label)
    texts, names = [text for _, text, _ in chosen], [name for _, _, name in chosen]
    model = _fit([texts[i] for i in inside], [names[i] for i in inside], classes, label, features)
    evaluation = evaluate(model, [texts[i] for i in aside], [names[i] for i in aside])
    model.facts.update(
        held_out_documents=evaluation.documents,
        held_out_accuracy=evaluation.accuracy,
        training_documents=len(inside),
    )
    return model, evaluation


def evaluate(model: TextModel, texts: Sequence[str], names: Sequence[str]) -> Evaluation:
    """Scores a model on documents whose classes are known."""
    found = [model.classes[choice] for choice in model.probabilities(texts).argmax(axis=1).tolist()]
    pairs = Counter(zip(names, found, strict=True))
    true, taken = Counter(names), Counter(found)
    scores = tuple(
        ClassScore(name, true[name], pairs[name, name] / max(1, taken[name]), pairs[name, name] / max(1, true[name]))
        for name in model.classes
    )
    wrong = [(one, other, count) for (one, other), count in pairs.items() if one != other]
    confusions = tuple(sorted(wrong, key=lambda item: (-item[2], item[0], item[1]))[:10])
    right = sum(count for (one, other), count in pairs.items() if one == other)
    return Evaluation(len(names), right / len(names), max(true.values()) / len(names), scores, confusions)


def _choose(documents: Iterable[tuple[str, str]], limit: int) -> list[tuple[int, str, str]]:
    """(hash, text, class) by hash, so that neither order nor duplicates of the input matter; at most `limit`."""
    by_hash: dict[int, tuple[str, str]] = {}
    for text, name in documents:
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        by_hash[key] = min((text, name), by_hash.get(key, (text, name)))
        if len(by_hash) >= 2 * limit + 1000:
            by_hash = dict(sorted(by_hash.items())[:limit])
    return [(key, *value) for key, value in sorted(by_hash.items())[:limit]]


def _check(
    chosen: Sequence[tuple[int, str, str]],
    aside: Sequence[int],
    inside: Sequence[int],
    classes: Sequence[str],
    label: str,
) -> None:
    if len(classes) < 2:
        raise UserError(f"label {label!r} has {len(classes)} value in these documents; two or more make a classifier")
    for part, numbers in (("train on", inside), ("hold out", aside)):
        lacking = sorted(set(classes) - {chosen[number][2] for number in numbers})
        if lacking:
            count = sum(name == lacking[0] for _, _, name in chosen)
            few = f"{label}={lacking[0]} has {count} distinct documents, none of them to {part}"
            raise UserError(f"{few}; add documents, or change --held-out")


def _fit(texts: list[str], names: list[str], classes: list[str], label: str, features: Features) -> TextModel:
    linear = require("sklearn.linear_model", extra="labels", purpose=PURPOSE)
    matrix = features.transform(texts)
    fitted = linear.SGDClassifier(
        loss="log_loss", alpha=1e-6, max_iter=_PASSES, tol=None, class_weight="balanced", random_state=0
    ).fit(matrix, names)
    weights, biases = np.asarray(fitted.coef_, np.float32), np.asarray(fitted.intercept_, np.float32)
    if len(classes) == 2:  # sklearn keeps the second class's scores only
        weights, biases = np.concatenate([-weights, weights]), np.concatenate([-biases, biases])
    facts: dict[str, Any] = {"classes": dict(sorted(Counter(names).items()))}
    return TextModel(label, tuple(classes), weights, biases, features, facts)
