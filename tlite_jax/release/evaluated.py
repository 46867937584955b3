"""What a card says of evaluations: rows and remarks, from the results files of `eval`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Evaluated:
    """One measurement of the last stage.

    Attributes:
      task, metric: their names.
      value: as measured.
      error: its standard error, if known.
      num_fewshot: examples, of a task; None: unknown, or not the same in all of a group.
      filter: how the answer was taken from what the model wrote, where a task has several ways.
      extent: what it was measured on, in words.
    """

    task: str
    metric: str
    value: float
    error: float | None = None
    num_fewshot: int | None = None
    filter: str | None = None
    extent: str = ""

    @property
    def metric_name(self) -> str:
        """The metric, with the filter where there are several."""
        return self.metric if self.filter is None else f"{self.metric} ({self.filter})"


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation has found, and remarks without which its rows would mislead."""

    rows: tuple[Evaluated, ...] = ()
    remarks: tuple[str, ...] = ()


def from_bits(values: Mapping[str, Any]) -> Evaluation:
    """Of `eval RUN --json`: bits per byte of held-out text."""
    return Evaluation(
        tuple(
            Evaluated(f"held-out text, {name}", "bits_per_byte", found["bits_per_byte"], extent=_tokens(found))
            for name, found in values["results"].items()
        )
    )


def from_harness(values: Mapping[str, Any]) -> Evaluation:
    """Of lm-evaluation-harness's results_*.json (0.4.13): a group that has metrics of its own stands for its subtasks.

    Their keys are "metric,filter", with "metric_stderr,filter" beside.
    """
    rows = [row for task in _shown(values) for row in _rows_of(values, task)]
    config = values.get("config", {})
    remarks = []
    if (limit := config.get("limit")) is not None:
        remarks.append(_limited("lm-evaluation-harness", limit))
    truncated = config.get("num_truncated") or {}
    if any(truncated.values()):
        counts = " and ".join(f"{count:,} {what}" for what, count in truncated.items() if count)
        remarks.append(f"lm-evaluation-harness: {counts} were longer than the context and lost their beginning.")
    return Evaluation(tuple(rows), tuple(remarks))


def from_mera(values: Mapping[str, Any]) -> Evaluation:
    """Of `eval --mera`'s results.json: the total first, then tasks; domains and groups of a task are left out."""
    name, split, limit = f"MERA {values['version']}", values["split"], values.get("limit")
    name += "" if split == "test" else f", {split}"
    rows, unscored = [], []
    for task, found in values["tasks"].items():
        scores = {metric: value for metric, value in (found["metrics"] or {}).items() if "." not in metric}
        unscored += [] if scores else [task]
        extent = _documents(found["documents"], None if limit is None else "limited")
        rows += [
            Evaluated(f"{name}: {task}", metric, value, num_fewshot=found["shots"], extent=extent)
            for metric, value in scores.items()
        ]
    if values["total"] is not None:
        rows.insert(0, Evaluated(f"{name}: total", "score", values["total"], extent="its 17 tasks"))
    remarks = [] if limit is None else [_limited(name, limit)]
    if values["total"] is None:
        remarks.append(f"{name}: no total, which needs scores of all 17 tasks.")
    if unscored:
        remarks.append(f"{name}: not scored here, for want of public answers or of a scorer: {', '.join(unscored)}.")
    if values.get("truncated"):
        remarks.append(f"{name}: {values['truncated']:,} prompts were longer than the context and were cut.")
    return Evaluation(tuple(rows), tuple(remarks))


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """All of them as one; a remark is made once."""
    rows = tuple(row for part in parts for row in part.rows)
    return Evaluation(rows, tuple(dict.fromkeys(remark for part in parts for remark in part.remarks)))


def _limited(name: str, limit: float) -> str:
    amount = f"{limit:g} of the documents of each task" if limit < 1 else f"{limit:g} documents of each task at most"
    return f"**{name} was run on {amount} (`limit`): not to be compared with results on whole tasks.**"


def _tokens(found: Mapping[str, Any]) -> str:
    return f"{found['tokens']:,} tokens" if "tokens" in found else ""


def _documents(count: int, more: str | None = None) -> str:
    return f"{count:,} document{'s' * (count != 1)}" + ("" if more is None else f", {more}")


def _shown(values: Mapping[str, Any]) -> list[str]:
    """The tasks and groups whose rows stand for all: none of them lies in a group that is shown itself."""
    groups = values.get("group_subtasks", {})
    hidden = {task for group in groups if _metrics(values["results"].get(group, {})) for task in _below(groups, group)}
    return [task for task in values["results"] if task not in hidden]


def _below(groups: Mapping[str, Sequence[str]], group: str) -> list[str]:
    """The groups and tasks in a group, at any depth."""
    found: list[str] = []
    waiting = list(groups.get(group, ()))
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found.append(name)
            waiting += groups.get(name, ())
    return found


def _metrics(found: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(metric, filter, value) of a task's results; a group without metrics of its own has none."""
    listed = []
    for key, value in found.items():
        metric, comma, filter_ = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            listed.append((metric, filter_, float(value)))
    return listed


def _rows_of(values: Mapping[str, Any], task: str) -> list[Evaluated]:
    found = values["results"][task]
    metrics = _metrics(found)
    rows = []
    for metric, filter_, value in metrics:
        several = sum(other == metric for other, _, _ in metrics) > 1
        error = found.get(f"{metric}_stderr,{filter_}")
        row = Evaluated(task, metric, value, error if isinstance(error, float) and math.isfinite(error) else None)
        rows.append(replace(row, filter=filter_ if several else None))
    shots, extent = _shots(values, task), _extent(values, task)
    return [replace(row, num_fewshot=shots, extent=extent) for row in rows]


def _leaves(values: Mapping[str, Any], task: str) -> list[str]:
    """The tasks of a group, or the task itself."""
    groups = values.get("group_subtasks", {})
    return [name for name in _below(groups, task) if not groups.get(name)] or [task]


def _shots(values: Mapping[str, Any], task: str) -> int | None:
    given = {values.get("n-shot", {}).get(name) for name in _leaves(values, task)}
    return given.pop() if len(given) == 1 else None


def _extent(values: Mapping[str, Any], task: str) -> str:
    leaves, samples = _leaves(values, task), values.get("n-samples", {})
    counts = [samples[name] for name in leaves if name in samples]
    if len(counts) < len(leaves):
        return ""
    asked, all_ = (sum(count[what] for count in counts) for what in ("effective", "original"))
    text = _documents(all_) if asked == all_ else f"{asked:,} of {_documents(all_)}"
    return text if leaves == [task] else f"{len(leaves)} subtask{'s' * (len(leaves) != 1)}, {text}"
