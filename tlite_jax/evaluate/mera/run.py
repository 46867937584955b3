"""Puts MERA's questions to a model and keeps its answers, task by task, so that an interrupted run goes on."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tlite_jax.errors import UserError
from tlite_jax.evaluate.mera import execute, prompts
from tlite_jax.evaluate.mera.documents import Document, document_id, has_answer, load_documents
from tlite_jax.evaluate.mera.model import MAX_NEW_TOKENS, Progress, TextModel
from tlite_jax.evaluate.mera.score import Scores, score_task
from tlite_jax.evaluate.mera.tasks import Split, Task

NUM_SAMPLES = 10  # programs per document of "code", sampled with the seeds 0 to 9

TaskProgress = Callable[[str, int, int], None]  # (task, done, all)


@dataclass(frozen=True)
class Record:
    """One document's answer.

    Attributes:
      id: of the document.
      context: what the model was given.
      scores: nats of context and choice, for each choice.
      texts: what the model wrote: one, or `NUM_SAMPLES` programs.
      answer: as in the submission; None for programs that were not run.
    """

    id: int | str
    context: str
    scores: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    answer: Any = None


@dataclass(frozen=True)
class TaskRun:
    """A task's documents and answers, the latter in the order of the requests."""

    task: Task
    documents: list[Document]
    records: list[Record]

    @property
    def is_answered(self) -> bool:
        """Whether every document asked has an answer."""
        return all(record.answer is not None for record in self.records)

    def scores(self) -> Scores | None:
        """Metrics, where every document asked says what is right and has an answer; else None."""
        by_id = {document_id(self.task, document): document for document in self.documents}
        pairs = [(by_id[record.id], record.answer) for record in self.records]
        if not self.is_answered or not all(has_answer(self.task, document) for document, _ in pairs):
            return None
        return score_task(self.task, pairs) or None


@dataclass(frozen=True)
class Questions:
    """What a task asks.

    Attributes:
      task: of `TASKS`.
      documents: all of the split, in the dataset's order.
      asked: documents to ask and their contexts, in the order of the requests; a dialogue's contexts are made later.
    """

    task: Task
    documents: list[Document]
    asked: list[tuple[Document, str]]


def prepare(root: Path, task: Task, *, split: Split, limit: float | None) -> Questions:
    """Reads a task's documents and builds its contexts.

    Args:
      root: copy of the dataset.
      task: of `TASKS`.
      split: which documents.
      limit: number of documents, after the shuffle, or a share of them below 1; None: all.

    Raises:
      UserError: documents missing, broken or too few.
    """
    documents = load_documents(root, task, split)
    count = len(documents) if limit is None else int(limit * len(documents) if limit < 1 else limit)
    if count < 1:
        raise UserError(f"a limit of {limit} leaves no document of {task.name}'s {len(documents)}")
    if task.kind == "dialogue":
        for number in range(len(documents)):
            prompts.dialogue_context(task, documents, ["1"] * number)  # a document that is broken is said now
        return Questions(task, documents, [(document, "") for document in documents[:count]])
    examples = load_documents(root, task, "labelled") if task.shots else []
    same_split = split == "labelled" and bool(task.shots)
    return Questions(task, documents, prompts.contexts(task, documents, examples, count, same_split=same_split))


def run_task(
    model: TextModel,
    questions: Questions,
    *,
    allow_code: bool,
    store: Path,
    identity: Mapping[str, Any],
    progress: TaskProgress,
) -> TaskRun:
    """Asks every question of a task, or takes the answers that an earlier run kept.

    Args:
      model: to be asked.
      questions: from `prepare`.
      allow_code: whether programs that the model writes may run.
      store: directory of kept answers.
      identity: what the answers depend on besides the questions: version, checkpoint, dtype.
      progress: called with (task, done, all).

    Raises:
      UserError: kept answers that are not readable.
      FloatingPointError: log-likelihoods that are not finite.
    """
    task, documents = questions.task, questions.documents
    key = _key(questions, identity)
    path = store / f"{task.name}.json"
    report = functools.partial(progress, task.name)
    records = _kept(path, key)
    if records is None:
        ask = {"choice": _choose, "text": _write, "code": _program, "dialogue": _converse}[task.kind]
        records = ask(model, task, questions.asked, report)
        _keep(path, key, records)
    if task.kind == "code" and allow_code and not all(record.answer is not None for record in records):
        records = _execute(records, {document_id(task, x): x for x in documents}, report)
        _keep(path, key, records)
    return TaskRun(task, documents, records)


Asked = Sequence[tuple[Document, str]]


def _choose(model: TextModel, task: Task, asked: Asked, report: Progress) -> list[Record]:
    pairs = [(context, f" {choice}") for _, context in asked for choice in task.choices]
    scores = model.score(pairs, report)
    width = len(task.choices)
    return [
        _chosen(task, document_id(task, document), context, scores[first : first + width])
        for (document, context), first in zip(asked, range(0, len(scores), width), strict=True)
    ]


def _chosen(task: Task, name: int | str, context: str, scores: list[float]) -> Record:
    if not all(math.isfinite(value) for value in scores):
        raise FloatingPointError(f"{task.name} document {name}: the model's log-likelihoods are {scores}")
    best = max(range(len(scores)), key=scores.__getitem__)  # the first of equals
    return Record(name, context, scores=scores, answer=task.answers[best])


def _converse(model: TextModel, task: Task, asked: Asked, report: Progress) -> list[Record]:
    documents = [document for document, _ in asked]
    records: list[Record] = []
    for number in range(len(documents)):
        context = prompts.dialogue_context(task, documents, [record.answer for record in records])
        scores = model.score([(context, f" {choice}") for choice in task.choices], _silent)
        records.append(_chosen(task, document_id(task, documents[number]), context, scores))
        report(number + 1, len(documents))
    return records


def _write(model: TextModel, task: Task, asked: Asked, report: Progress) -> list[Record]:
    texts = model.generate(
        [context for _, context in asked], stops=task.stops, max_tokens=MAX_NEW_TOKENS, seed=None, progress=report
    )
    return [
        Record(document_id(task, document), context, texts=[text], answer=text.strip())
        for (document, context), text in zip(asked, texts, strict=True)
    ]


def _program(model: TextModel, task: Task, asked: Asked, report: Progress) -> list[Record]:
    samples = []
    for seed in range(NUM_SAMPLES):
        contexts = [context for _, context in asked]
        step = functools.partial(_shifted, report, seed * len(asked), NUM_SAMPLES * len(asked))
        samples.append(model.generate(contexts, stops=task.stops, max_tokens=MAX_NEW_TOKENS, seed=seed, progress=step))
    return [
        Record(document_id(task, document), context, texts=[texts[number] for texts in samples])
        for number, (document, context) in enumerate(asked)
    ]


def _execute(records: Sequence[Record], documents: Mapping[int | str, Document], report: Progress) -> list[Record]:
    programs = [
        execute.Program(
            documents[record.id]["inputs"]["function"] + text,
            documents[record.id]["meta"]["entry_point"],
            documents[record.id]["inputs"]["tests"],
        )
        for record in records
        for text in record.texts
    ]
    results = execute.run_programs(programs, report)
    return [
        Record(record.id, record.context, texts=record.texts, answer=results[first : first + len(record.texts)])
        for record, first in zip(records, range(0, len(results), NUM_SAMPLES), strict=True)
    ]


def _silent(done: int, total: int) -> None:
    pass


def _shifted(report: Progress, before: int, total: int, done: int, _: int) -> None:
    report(before + done, total)


def _key(questions: Questions, identity: Mapping[str, Any]) -> str:
    content = json.dumps([asdict(questions), identity], ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _kept(path: Path, key: str) -> list[Record] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not readable; delete it to ask that task again") from error
    return [Record(**record) for record in kept["records"]] if kept["key"] == key else None


def _keep(path: Path, key: str, records: Sequence[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    content = {"key": key, "records": [asdict(record) for record in records]}
    part.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    os.replace(part, path)
