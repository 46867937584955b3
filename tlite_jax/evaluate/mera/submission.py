"""Answers -> the ZIP that MERA's site takes, in the layout of `scripts/log_to_submission.py`."""

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlite_jax.evaluate.mera.documents import Document, document_id
from tlite_jax.evaluate.mera.tasks import Task

_FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # the same answers give the same file


def submission_json(task: Task, documents: Sequence[Document], answers: Mapping[Any, Any], order: Sequence[Any]) -> str:
    """One task's file.

    Args:
      task: of `TASKS`.
      documents: all of the split, in the dataset's order.
      answers: document id -> answer.
      order: document ids in the order of the requests.

    Returns:
      JSON, indented by four, Cyrillic as it is.
    """
    by_id = {document_id(task, document): document for document in documents}
    entries: list[Any]
    if task.kind == "dialogue":
        entries = [[_dialogue_entry(document, answers[document_id(task, document)]) for document in documents]]
    else:
        entries = [_entry(task, by_id[name], answers[name]) for name in order]
    return json.dumps({"data": {"test": entries}}, ensure_ascii=False, indent=4)


def write_zip(path: Path, files: Mapping[str, str]) -> None:
    """Writes the files at the ZIP's root; the ZIP appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, _FIRST_DAY), files[name], zipfile.ZIP_DEFLATED)
    os.replace(part, path)


def _entry(task: Task, document: Document, answer: Any) -> dict[str, Any]:
    meta = {"id": document["meta"]["id"]}
    outputs = answer
    if task.name == "MultiQ":
        outputs = [_span(document, answer)]
    elif task.name == "USE":
        meta |= {key: document["meta"][key] for key in ("id_task", "variant")}
    elif task.name == "ruEthics":
        outputs = dict.fromkeys(("virtue", "law", "moral", "justice", "utilitarianism"), answer)
    return {"outputs": outputs, "meta": meta}


def _dialogue_entry(document: Document, answer: str) -> dict[str, Any]:
    return {"outputs": answer, "meta": {key: document["meta"][key] for key in ("dialog_id", "question_id")}}


def _span(document: Document, answer: str) -> dict[str, Any]:
    """Where the answer stands in the supporting text, else in the text, else -1."""
    inputs = document["inputs"]
    offset = inputs["support_text"].find(answer)
    if offset == -1:
        offset = inputs["text"].find(answer)
    label = document["outputs"][0]["label"]
    return {"label": label, "length": len(answer), "offset": offset, "segment": answer}
