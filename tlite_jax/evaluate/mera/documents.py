"""MERA's documents from a copy of its dataset: jsonl as on the hub, or parquet as the hub converts it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from tlite_jax.errors import UserError
from tlite_jax.evaluate.mera.tasks import REPOSITORY, Split, Task

Document = dict[str, Any]

_SPLIT_NAMES = {"validation": ("validation", "dev"), "public_test": ("public_test", "train"), "train": ("train",)}
_OLD_FOLDERS = {"ruopenbookqa": ("ruopenbook",)}
USE_TYPES = (
    "text",
    "matching",
    "multiple_choice_based_on_text",
    "multiple_choice_options_within_text",
    "multiple_choice_independent_options",
)
# Fields of `inputs` and `meta` that prompts, scores or the submission need whatever the instruction says.
_INPUTS: dict[str, tuple[str, ...]] = {
    "CheGeKa": ("topic", "text"),
    "MultiQ": ("support_text", "text"),
    "ruHumanEval": ("function", "tests"),
    "ruTiE": ("question", "choice1", "choice2"),
    "ruHateSpeech": ("target_group",),
}
_META: dict[str, tuple[str, ...]] = {
    "USE": ("id", "id_task", "variant", "type"),
    "ruTiE": ("dialog_id", "question_id"),
    "ruHumanEval": ("id", "entry_point"),
    "ruMMLU": ("id", "domain"),
    "ruEthics": ("id", "question"),
    "ruHHH": ("id", "criteria"),
}


def download(revision: str | None) -> Path:
    """Fetches the dataset from the hub into its cache.

    Raises:
      UserError: it cannot be had, and how to go on without the hub.
    """
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(REPOSITORY, repo_type="dataset", revision=revision, allow_patterns=["data/*"])
    except Exception as error:
        raise UserError(
            f"cannot download {REPOSITORY}: {type(error).__name__}; copy the dataset here and give --mera DIRECTORY"
        ) from error
    return Path(path)


def load_documents(root: Path, task: Task, split: Split) -> list[Document]:
    """Reads and checks one split of one task, in the dataset's order.

    Args:
      root: directory that holds `data/bps/test.jsonl` and so on.
      task: of `TASKS`.
      split: "labelled" is "train" or "public_test", whichever the task has.

    Returns:
      documents with `instruction`, `inputs`, `outputs` and `meta`; ruTiE's sorted by question.

    Raises:
      UserError: no such split or file, or a document that is broken, named by task and id.
    """
    name = task.examples if split == "labelled" else split
    if name is None:
        raise UserError(f"{task.name} has only test documents; leave it out of --mera-tasks")
    files = _find(root, task, name)
    documents = [_check(task, row, path, number) for path in files for number, row in enumerate(_rows(path), 1)]
    if not documents:
        raise UserError(f"{files[0]} holds no document of {task.name}")
    if task.kind == "dialogue":
        documents.sort(key=lambda document: document["meta"]["question_id"])
    _check_ids(task, documents, files[0])
    return documents


def document_id(task: Task, document: Document) -> int | str:
    """What names a document within its split."""
    return document["meta"]["question_id" if task.kind == "dialogue" else "id"]


def group_of(task: Task, document: Document) -> str | None:
    """The value of the task's `group`, if it has one."""
    if task.group is None:
        return None
    part, field = task.group.split(".")
    return str(document[part][field])


def has_answer(task: Task, document: Document) -> bool:
    """Whether a document says what is right; those of the test split do not."""
    outputs = document["outputs"]
    if task.name == "MultiQ":
        return bool(outputs) and any(output["segment"] for output in outputs)
    if task.name == "ruEthics":
        return bool(outputs) and all(value != "" for value in outputs.values())
    return any(outputs) if isinstance(outputs, list) else bool(outputs)


def _find(root: Path, task: Task, split: str) -> list[Path]:
    names = _SPLIT_NAMES.get(split, (split,))
    folders = (task.folder, *_OLD_FOLDERS.get(task.folder, ()))
    for folder in [parent / name for name in folders for parent in (root / "data", root)]:
        for name in names:
            for pattern in (f"{name}.jsonl", f"{name}.parquet", f"{name}-*.parquet", f"{name}/*.parquet"):
                found = sorted(folder.glob(pattern))
                if found:
                    return found
    raise UserError(
        f"{task.name}: no {' or '.join(names)} documents in {root}; expected {root / 'data' / task.folder}/"
        f"{names[0]}.jsonl or {task.folder}/{names[0]}/*.parquet: give --mera a copy of the dataset {REPOSITORY}"
    )


def _rows(path: Path) -> Sequence[Any]:
    if path.suffix == ".parquet":
        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path} is not readable parquet: {str(error).splitlines()[0]}; copy it again") from error
    rows: list[Any] = []
    try:
        with path.open(encoding="utf-8") as lines:
            rows.extend(json.loads(line) for line in lines if line.strip())
    except ValueError as error:
        raise UserError(f"{path}: document {len(rows) + 1} is not JSON ({error}); copy the file again") from error
    return rows


def _check(task: Task, row: Any, path: Path, number: int) -> Document:
    """A document as the prompts expect it, or the reason why not."""
    row = row if isinstance(row, dict) else {}
    meta = row.get("meta")
    key = "question_id" if task.kind == "dialogue" else "id"
    name = meta.get(key) if isinstance(meta, dict) else None
    place = f"{task.name} document {name if name is not None else f'in line {number}'} ({path})"
    if name is None or not isinstance(meta, dict):
        raise UserError(f"{place}: no meta.{key}; is this MERA's {task.folder}?")
    if not isinstance(row.get("instruction"), str):
        raise UserError(f"{place}: instruction is not a string")
    for field in _META.get(task.name, ()):
        if meta.get(field) is None:
            raise UserError(f"{place}: no meta.{field}")
    inputs = row.get("inputs")
    if not isinstance(inputs, (str, dict)):
        raise UserError(f"{place}: inputs is neither a string nor an object")
    for field in _INPUTS.get(task.name, ()):
        if not isinstance(inputs, dict) or inputs.get(field) is None:
            raise UserError(f"{place}: no inputs.{field}")
    if task.name == "USE" and meta["type"] not in USE_TYPES:
        raise UserError(f"{place}: meta.type is {meta['type']!r}; known are {', '.join(USE_TYPES)}")
    outputs = _outputs(task, row.get("outputs"), place)
    if task.kind == "code":
        # The hub's loader declares both as strings; a plain jsonl may hold the values themselves.
        tests = inputs["tests"]
        inputs = {**inputs, "tests": tests if isinstance(tests, str) else repr(tests)}
    return {"instruction": row["instruction"], "inputs": inputs, "outputs": outputs, "meta": meta}


def _outputs(task: Task, outputs: Any, place: str) -> Any:
    if task.name == "MultiQ":
        good = isinstance(outputs, list) and all(isinstance(x, dict) and "segment" in x for x in outputs)
        if not good or not outputs:
            raise UserError(f"{place}: outputs is not a list of spans with a segment")
        return outputs
    if task.name == "ruEthics":
        return outputs or {}
    if task.kind == "code":
        return [x if isinstance(x, str) else repr(x) for x in outputs or []]
    if outputs is None:
        return ""
    if not isinstance(outputs, str):
        raise UserError(f"{place}: outputs is {type(outputs).__name__}, not a string")
    if task.choices and outputs and outputs not in task.choices:
        raise UserError(f"{place}: outputs is {outputs!r}; possible are {', '.join(task.choices)}")
    return outputs


def _check_ids(task: Task, documents: Sequence[Document], path: Path) -> None:
    ids = [document_id(task, document) for document in documents]
    if task.kind == "dialogue":
        if ids != list(range(len(ids))):
            raise UserError(f"{task.name} ({path}): question_id must run from 0 without a gap, one dialogue only")
        return
    seen: set[Any] = set()
    for name in ids:
        if name in seen:
            raise UserError(f"{task.name} document {name} ({path}): the id is given twice")
        seen.add(name)
