"""Contexts, character for character; what the original's code makes of the same documents is fixed as a digest."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from bench import mini_mera
from tlite_jax.errors import UserError
from tlite_jax.evaluate.mera.documents import load_documents
from tlite_jax.evaluate.mera.prompts import contexts, dialogue_context, full_prompt, short_prompt
from tlite_jax.evaluate.mera.tasks import TASKS, select_tasks

TASK = {task.name: task for task in TASKS}
# Of every context on `mini_mera.write(documents=8, answers=True)`, when bench/mera_original.py called them all equal.
DIGEST = "e613eebb5ec90d8bc19f404b24decf90fc25baabdabe6df4224c7292b93b680f"


def document(instruction: str, inputs, outputs="", **meta) -> dict:
    return {"instruction": instruction, "inputs": inputs, "outputs": outputs, "meta": {"id": 1, **meta}}


def test_only_these_tasks_go_without_stripping():
    instruction, inputs = "\nДано: {inputs} \n", "7"
    kept = [task.name for task in TASKS if full_prompt(task, document(instruction, {"inputs": "7"})) != "Дано: 7"]
    assert full_prompt(TASK["SimpleAr"], document(instruction, inputs)) == "Дано: 7"
    assert kept == ["BPS", "PARus", "RCB", "ruEthics", "ruHateSpeech", "RWSD", "ruTiE", "ruHumanEval"]


def test_an_answer_is_asked_for_after_the_instruction():
    asked = document("{premise}\n1. {choice1}\n2. {choice2} ", {"premise": "Дождь.", "choice1": "а", "choice2": "б"})
    assert full_prompt(TASK["PARus"], asked) == "Дождь.\n1. а\n2. б \nОтвет:"


def test_brackets_are_put_in_as_they_are():
    asked = document('Скобки "{inputs}" верны? {да}\n', "{ ( } )")
    assert full_prompt(TASK["BPS"], asked) == 'Скобки "{ ( } )" верны? {да}\n'
    assert short_prompt(TASK["BPS"], asked) == "{ ( } )"


def test_only_the_first_example_has_its_instruction():
    examples = [
        document("Тема {topic}. {text} Ответ:", {"topic": f"т{i}", "text": f"в{i}?"}, f"о{i}", id=i) for i in range(9)
    ]
    asked = document("Тема {topic}. {text} Ответ:", {"topic": "а", "text": "б?"}, "", id=100)
    ((_, context),) = contexts(TASK["CheGeKa"], [asked], examples, None, same_split=False)
    generator = random.Random(42)
    generator.shuffle([asked])
    a, b, c, d = (example["meta"]["id"] for example in generator.sample(examples, 4))
    assert context == (
        f"Тема т{a}. в{a}? Ответ: о{a}\n\n"
        + "".join(f'Категория "т{i}"\nВопрос: в{i}?\nОтвет: о{i}\n\n' for i in (b, c, d))
        + 'Категория "а"\nВопрос: б?\nОтвет:'
    )


def test_one_generator_shuffles_and_draws(tmp_path):
    """Restated from the rule: shuffle, then for each document in turn a sample of the examples."""
    root = mini_mera.write(tmp_path)
    task = TASK["SimpleAr"]
    asked, examples = load_documents(root, task, "test"), load_documents(root, task, "labelled")
    found = contexts(task, asked, examples, None, same_split=False)
    generator, expected = random.Random(42), list(asked)
    generator.shuffle(expected)
    assert [document for document, _ in found] == expected != asked
    for (_, context), _ in zip(found, expected, strict=True):
        shots = generator.sample(examples, 5)
        assert context.split("\n\n")[1:5] == [f"{shot['inputs'].strip()} {shot['outputs']}" for shot in shots[1:]]
    # A limit takes the first of the shuffled ones, with the same examples.
    assert contexts(task, asked, examples, 3, same_split=False) == found[:3]


def test_examples_of_rummlu_share_the_domain(tmp_path):
    root = mini_mera.write(tmp_path, documents=6)
    task = TASK["ruMMLU"]
    asked, examples = load_documents(root, task, "test"), load_documents(root, task, "labelled")
    for example in examples:
        example["inputs"]["text"] = f"вопрос {example['meta']['id']}"
    for document, context in contexts(task, asked, examples, None, same_split=False):
        numbers = [int(found) for found in re.findall(r"вопрос (\d+)", context)]
        assert len(numbers) == 5
        assert {examples[number]["meta"]["domain"] for number in numbers} == {document["meta"]["domain"]}
    few = [example for example in examples if example["meta"]["domain"] == "astronomy"][:4]
    with pytest.raises(UserError, match=r"holds 4 documents of meta.domain 'astronomy', 5 are needed"):
        contexts(task, [d for d in asked if d["meta"]["domain"] == "astronomy"], few, None, same_split=False)


def test_a_document_is_never_its_own_example(tmp_path):
    task = TASK["SimpleAr"]
    documents = load_documents(mini_mera.write(tmp_path), task, "labelled")[:6]  # 5 + 1 drawn: all of them
    for document, context in contexts(task, documents, documents, None, same_split=True):
        answers = [f"{other['inputs'].strip()} {other['outputs']}" for other in documents if other is not document]
        assert all(answer in context for answer in answers)
        assert f"{document['inputs'].strip()} {document['outputs']}" not in context


def test_a_dialogue_tells_the_models_own_answers():
    instruction = "Диалог.\n{context}\n{question}\n1) {choice1}\n2) {choice2}\nКакой?"
    documents = [
        document(instruction, {"question": f"В{i}", "choice1": "а", "choice2": "б"}, question_id=i) for i in range(3)
    ]
    documents[2]["instruction"] = "Другая"  # the first one's counts
    task = TASK["ruTiE"]
    assert dialogue_context(task, documents, []) == "Диалог.\nВ0\n1) а\n2) б\nКакой?\nОтвет:"
    past = "В0\n1. а\n2. б\nОтвет: 2\nВ1\n1. а\n2. б\nОтвет: 1"
    assert dialogue_context(task, documents, ["2", "1"]) == f"Диалог.\n{past}\nВ2\n1) а\n2) б\nКакой?\nОтвет:"


def test_every_context_is_as_the_original_builds_it(tmp_path):
    root = mini_mera.write(tmp_path, documents=8, answers=True)
    found = {}
    for task in TASKS:
        documents = load_documents(root, task, "test")
        if task.kind == "dialogue":
            answers = [str(number % 2 + 1) for number in range(8)]
            found[task.name] = [dialogue_context(task, documents, answers[:number]) for number in range(8)]
        else:
            examples = load_documents(root, task, "labelled") if task.shots else []
            found[task.name] = [text for _, text in contexts(task, documents, examples, None, same_split=False)]
    assert hashlib.sha256(json.dumps(found, ensure_ascii=False).encode()).hexdigest() == DIGEST


@pytest.mark.parametrize(
    ("instruction", "error"),
    [
        ("{нет}", r"MathLogicQA document 5: its prompt names {нет}, its inputs hold text, option_a"),
        ("{text", r"MathLogicQA document 5: its instruction is no template \(expected"),
        ("{}", r"MathLogicQA document 5: its instruction is no template \(Replacement"),
    ],
)
def test_an_instruction_that_cannot_be_filled_in_is_named(instruction, error):
    with pytest.raises(UserError, match=error):
        full_prompt(TASK["MathLogicQA"], document(instruction, {"text": "а", "option_a": "б"}, id=5))


def test_the_cards_shots():
    shots = {0: "MultiQ PARus RCB ruHumanEval ruModAr ruTiE RWSD USE", 2: "BPS LCS", 4: "CheGeKa"}
    shots[5] = "MathLogicQA ruMMLU ruMultiAr ruOpenBookQA ruWorldTree SimpleAr"
    expected = {name: count for count, names in shots.items() for name in names.split()}
    assert {task.name: task.shots for task in select_tasks(None)} == expected


def test_names_of_tasks():
    assert [task.name for task in select_tasks(["USE", "bps"])] == ["BPS", "USE"]
    assert len(select_tasks(["all"])) == 21
    with pytest.raises(UserError, match=r"MERA has no task 'rumlu'; nearest: ruMMLU"):
        select_tasks(["rumlu"])


def test_nothing_is_written_where_it_was_read(tmp_path):
    root: Path = mini_mera.write(tmp_path)
    documents = load_documents(root, TASK["ruTiE"], "test")
    before = json.dumps(documents)
    dialogue_context(TASK["ruTiE"], documents, ["1"])
    assert json.dumps(documents) == before
