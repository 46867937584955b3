"""What a run of MERA leaves behind: results, the submission, the logs that a public submission shows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlite_jax.evaluate.mera.run import TaskRun
from tlite_jax.evaluate.mera.score import task_score, total_score
from tlite_jax.evaluate.mera.submission import submission_json, write_zip
from tlite_jax.evaluate.mera.tasks import TASKS


def results(runs: Sequence[TaskRun]) -> dict[str, Any]:
    """Metrics of every task, and the total where all 17 tasks have metrics.

    Returns:
      {"tasks": {name: {"shots", "documents", "metrics" or None, "score" or None}}, "total": or None}.
    """
    tasks: dict[str, Any] = {}
    scored: dict[str, Mapping[str, float]] = {}
    for run in runs:
        scores = run.scores()
        counted = scores is not None and any("." not in name for name in scores)
        if scores is not None and counted:
            scored[run.task.name] = scores
        tasks[run.task.name] = {
            "shots": run.task.shots,
            "documents": len(run.records),
            "metrics": scores,
            "score": task_score(scores) if scores is not None and counted else None,
        }
    return {"tasks": tasks, "total": total_score(scored)}


def write_submission(path: Path, runs: Sequence[TaskRun]) -> list[str]:
    """Writes the ZIP of all answers, and beside it the logs, as PATH_logs_public.zip.

    Args:
      path: of the ZIP.
      runs: on whole test splits.

    Returns:
      files that the site wants and the ZIP lacks.
    """
    files = {}
    for run in runs:
        if run.is_answered:
            answers = {record.id: record.answer for record in run.records}
            order = [record.id for record in run.records]
            files[f"{run.task.name}.json"] = submission_json(run.task, run.documents, answers, order)
    write_zip(path, files)
    logs = {f"{run.task.folder}_write_out_info.json": _log(run) for run in runs}
    write_zip(path.with_name(f"{path.stem}_logs_public.zip"), logs)
    return [f"{task.name}.json" for task in TASKS if f"{task.name}.json" not in files]


def _log(run: TaskRun) -> str:
    """Prompts and what the model made of them, in the form of the original's `--write_out`."""
    entries = []
    truths = {document["meta"].get("id"): document["outputs"] for document in run.documents}
    for record in run.records:
        entry: dict[str, Any] = {"doc_id": record.id}
        for number, (choice, score) in enumerate(zip(run.task.choices, record.scores, strict=False)):
            entry |= {f"prompt_{number}": f"{record.context} {choice}", f"logit_{number}": score}
        if record.texts:
            is_code = run.task.kind == "code"
            entry |= {"prompt_0": record.context, "logit_0": record.texts if is_code else record.texts[0]}
        if isinstance(record.answer, list):
            entry |= {f"solutions_{number}": found for number, found in enumerate(record.answer)}
        entries.append({**entry, "truth": truths.get(record.id)})
    return json.dumps(entries, ensure_ascii=False, indent=4)
