"""Answers -> metrics of a task, and the total score, by the rules of MERA's leaderboard."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tlite_jax.evaluate.mera import metrics
from tlite_jax.evaluate.mera.documents import Document, group_of
from tlite_jax.evaluate.mera.tasks import TOTAL_TASKS, Task

Scores = dict[str, float]
Pairs = Sequence[tuple[Document, Any]]


def score_task(task: Task, pairs: Pairs) -> Scores:
    """Scores the answers as they stand in the submission.

    Args:
      task: of `TASKS`.
      pairs: documents that have answers, with what the submission says: a string, or for "code" the results of each
        sampled program.

    Returns:
      metric -> value; those of a part are named "acc.PART" and do not count for the task's mean. Empty for ruDetox,
      whose metrics come from three other models.
    """
    if task.name in _SPECIAL:
        return _SPECIAL[task.name](task, pairs)
    if not task.metrics:
        return {}
    right = [(document, float(document["outputs"] == answer)) for document, answer in pairs]
    scores = {"acc": metrics.mean([value for _, value in right])}
    if "f1_macro" in task.metrics:
        scores["f1_macro"] = metrics.f1_macro([(document["outputs"], answer) for document, answer in pairs])
    if task.group:
        for part in sorted({str(group_of(task, document)) for document, _ in pairs}):
            values = [value for document, value in right if group_of(task, document) == part]
            scores[f"acc.{part}"] = metrics.mean(values)
    return scores


def task_score(scores: Mapping[str, float]) -> float:
    """The mean of a task's metrics, parts left out."""
    return metrics.mean([value for name, value in scores.items() if "." not in name])


def total_score(results: Mapping[str, Mapping[str, float]]) -> float | None:
    """The mean over the 17 tasks that count of each one's mean over its metrics.

    Args:
      results: task name -> scores; further tasks are ignored.

    Returns:
      None where one of the 17 is missing.
    """
    if any(task.name not in results for task in TOTAL_TASKS):
        return None
    return metrics.mean([task_score(results[task.name]) for task in TOTAL_TASKS])


def _words(golds: Callable[[Document], list[str]], pairs: Pairs) -> Scores:
    return {
        "f1": metrics.mean([metrics.token_f1(answer, golds(document)) for document, answer in pairs]),
        "em": metrics.mean([metrics.exact_match(answer, golds(document)) for document, answer in pairs]),
    }


def _chegeka(task: Task, pairs: Pairs) -> Scores:
    return _words(lambda document: document["outputs"].split(";"), pairs)


def _multiq(task: Task, pairs: Pairs) -> Scores:
    return _words(lambda document: [span["segment"] for span in document["outputs"]], pairs)


def _use(task: Task, pairs: Pairs) -> Scores:
    points = []
    for document, answer in pairs:
        meta = document["meta"]
        value = metrics.use_points(meta["type"], meta["id_task"], document["outputs"], answer)
        points.append((value, meta["variant"]))
    return {"grade_norm": metrics.grade_norm(points)}


def _humaneval(task: Task, pairs: Pairs) -> Scores:
    counts = [
        (len(samples), sum(metrics.is_solved(document["outputs"], found) for found in samples))
        for document, samples in pairs
    ]
    return {
        f"pass@{k}": metrics.mean([metrics.pass_at_k(samples, solved, k) for samples, solved in counts])
        for k in (1, 5, 10)
    }


def _ruethics(task: Task, pairs: Pairs) -> Scores:
    by_criterion: dict[str, list[tuple[float, float]]] = {}
    for document, answer in pairs:
        for criterion, gold in document["outputs"].items():
            name = f"{document['meta']['question']}.{criterion}"
            by_criterion.setdefault(name, []).append((float(gold), float(answer)))
    return {name: metrics.matthews(values) for name, values in sorted(by_criterion.items())}


_SPECIAL: dict[str, Callable[[Task, Pairs], Scores]] = {
    "CheGeKa": _chegeka,
    "MultiQ": _multiq,
    "USE": _use,
    "ruHumanEval": _humaneval,
    "ruEthics": _ruethics,
}
