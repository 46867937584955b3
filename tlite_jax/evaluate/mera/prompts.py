"""Documents -> contexts, character for character as MERA 1.1.0 builds them.

Quirks that change numbers: `Random(42)` shuffles the documents and the same generator draws each one's examples, so
order matters; only the first example carries its instruction; the question after examples carries none.
"""

import random
from collections.abc import Mapping, Sequence

from tlite_jax.errors import UserError
from tlite_jax.evaluate.mera.documents import Document, document_id, group_of
from tlite_jax.evaluate.mera.tasks import Task

SEED = 42


def full_prompt(task: Task, document: Document) -> str:
    """The instruction with the inputs filled in.

    Raises:
      UserError: the instruction names a field that the inputs lack.
    """
    fields = _fields(task, document)
    if task.literal:
        value = fields[task.inputs_name]
        text = document["instruction"]
        text = text.replace("{" + task.inputs_name + "}", value) if value else text
    else:
        text = _fill(task, document, document["instruction"], fields)
    return (text.strip() if task.strip else text) + task.suffix


def short_prompt(task: Task, document: Document) -> str:
    """The question without its instruction, where the task has such a form."""
    if task.short is None:
        return full_prompt(task, document)
    return _fill(task, document, task.short, _fields(task, document)).strip()


def contexts(
    task: Task, documents: Sequence[Document], examples: Sequence[Document], limit: int | None, *, same_split: bool
) -> list[tuple[Document, str]]:
    """Shuffles the documents and puts each one's examples before it.

    Args:
      task: not a dialogue.
      documents: in the dataset's order.
      examples: where the shots are drawn from; unused without shots.
      limit: number of documents, after the shuffle; None: all.
      same_split: whether documents are also among the examples; then a document is never its own example.

    Returns:
      (document, context) in the order of the requests.

    Raises:
      UserError: too few examples.
    """
    generator = random.Random(SEED)
    shuffled = list(documents)
    generator.shuffle(shuffled)
    groups: dict[str | None, list[Document]] = {}
    for example in examples:
        groups.setdefault(group_of(task, example), []).append(example)
    result = []
    for document in shuffled[:limit]:
        shots: list[Document] = []
        if task.shots:
            pool = groups.get(group_of(task, document), [])
            shots = _draw(task, document, pool, generator, same_split=same_split)
        result.append((document, _join(task, document, shots)))
    return result


def dialogue_context(task: Task, documents: Sequence[Document], answers: Sequence[str]) -> str:
    """The context of question `len(answers)`: everything before it with the answers that the model gave.

    The instruction is that of the first question throughout.
    """
    document = documents[len(answers)]
    past = [
        "{question}\n1. {choice1}\n2. {choice2}".format(**earlier["inputs"]) + f"{task.suffix} {answer}"
        for earlier, answer in zip(documents, answers, strict=False)
    ]
    fields = {**document["inputs"], "context": "\n".join(past)}
    text = _fill(task, document, documents[0]["instruction"], fields)
    return (text if answers else text.replace("\n\n", "\n")) + task.suffix


def _draw(
    task: Task, document: Document, pool: Sequence[Document], generator: random.Random, *, same_split: bool
) -> list[Document]:
    count = task.shots + same_split
    if len(pool) < count:
        group = f" of {task.group} {group_of(task, document)!r}" if task.group else ""
        raise UserError(
            f"{task.name} document {document_id(task, document)}: {task.examples} holds {len(pool)} documents{group}, "
            f"{count} are needed as examples"
        )
    drawn = generator.sample(pool, count)
    if same_split:
        name = document_id(task, document)
        drawn = [example for example in drawn if document_id(task, example) != name]
    return drawn[: task.shots]


def _join(task: Task, document: Document, shots: Sequence[Document]) -> str:
    if not shots:
        return full_prompt(task, document)
    worked = ""
    for number, shot in enumerate(shots):
        prompt = full_prompt(task, shot) if number == 0 else short_prompt(task, shot)
        worked += f"{prompt} {shot['outputs']}\n\n"
    return worked + short_prompt(task, document)


def _fields(task: Task, document: Document) -> Mapping[str, str]:
    inputs = document["inputs"]
    return {task.inputs_name: inputs} if isinstance(inputs, str) else inputs


def _fill(task: Task, document: Document, template: str, fields: Mapping[str, str]) -> str:
    try:
        return template.format(**fields)
    except KeyError as error:
        raise UserError(
            f"{task.name} document {document_id(task, document)}: its prompt names {{{error.args[0]}}}, "
            f"its inputs hold {', '.join(fields)}"
        ) from error
    except (ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{task.name} document {document_id(task, document)}: its instruction is no template ({error})"
        ) from error
