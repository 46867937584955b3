"""A whole run with a model whose answers are a function of the text, the submission it makes, and going on."""

import json
import zipfile

import pytest

from bench import mini_mera
from bench._mera_fake import FakeModel, score_text, write_text
from tlite_jax.errors import UserError
from tlite_jax.evaluate.mera.run import prepare, run_task
from tlite_jax.evaluate.mera.submission import submission_json, write_zip
from tlite_jax.evaluate.mera.tasks import TASKS, check_version

TASK = {task.name: task for task in TASKS}


@pytest.fixture
def root(tmp_path):
    return mini_mera.write(tmp_path / "mera", answers=True)


def run(name, root, store, model=None, *, split="test", limit=None, **fields):
    options = {"allow_code": False, "identity": {}, "progress": lambda *_: None}
    questions = prepare(root, TASK[name], split=split, limit=limit)
    return run_task(model or FakeModel(), questions, store=store, **{**options, **fields})


def entries(made) -> list:
    answers = {record.id: record.answer for record in made.records}
    text = submission_json(made.task, made.documents, answers, [record.id for record in made.records])
    return json.loads(text)["data"]["test"]


def best(context: str, choices: tuple[str, ...]) -> str:
    return max(choices, key=lambda choice: score_text(f"{context} {choice}"))


def test_the_likeliest_choice_is_the_answer(root, tmp_path):
    made = run("MathLogicQA", root, tmp_path)
    assert [record.answer for record in made.records] == [
        best(record.context, tuple("ABCD")) for record in made.records
    ]
    assert entries(made)[0] == {"outputs": made.records[0].answer, "meta": {"id": made.records[0].id}}


def test_bps_is_submitted_the_wrong_way_round(root, tmp_path):
    """As by 1.1.0's own script, which takes the first score, that of " 1", for "0"."""
    made = run("BPS", root, tmp_path)
    for record in made.records:
        assert record.answer == {"1": "0", "0": "1"}[best(record.context, ("1", "0"))]


def test_of_equal_choices_the_first_is_the_answer(root, tmp_path):
    class Undecided(FakeModel):
        def score(self, pairs, progress):
            return [-1.0] * len(pairs)

    assert {record.answer for record in run("RWSD", root, tmp_path, Undecided()).records} == {"Да"}


def test_a_number_that_is_none_stops(root, tmp_path):
    class Broken(FakeModel):
        def score(self, pairs, progress):
            return [float("nan")] * len(pairs)

    with pytest.raises(FloatingPointError, match=r"RWSD document \d: the model's log-likelihoods are \[nan, nan\]"):
        run("RWSD", root, tmp_path, Broken())


def test_a_dialogue_hears_its_own_answers(root, tmp_path):
    made = run("ruTiE", root, tmp_path)
    answers = [record.answer for record in made.records]
    assert answers == [best(record.context, ("1", "2")) for record in made.records]
    assert [line[7:] for line in made.records[-1].context.splitlines() if line.startswith("Ответ: ")] == answers[:-1]
    (dialogue,) = entries(made)
    assert dialogue[3] == {"outputs": answers[3], "meta": {"dialog_id": 0, "question_id": 3}}


def test_spans_say_where_they_stand(root, tmp_path):
    class Reader(FakeModel):
        def generate(self, contexts, **_):
            return [" Тверь ", " живёт", "", "нет такого"] + [" Город"] * (len(contexts) - 4)

    made = run("MultiQ", root, tmp_path, Reader())
    inputs = {document["meta"]["id"]: document["inputs"] for document in made.documents}
    spans = [(entry["outputs"][0], inputs[entry["meta"]["id"]]) for entry in entries(made)]
    for number, (span, texts) in enumerate(spans):
        where = "support_text" if number == 1 else "text"
        expected = {2: 0, 3: -1}.get(number, texts[where].find(span["segment"]))
        assert (span["offset"], span["length"]) == (expected, len(span["segment"]))
    assert spans[1][0]["segment"] == "живёт"
    assert spans[1][0]["offset"] > 0


def test_exam_answers_name_their_task(root, tmp_path):
    made = run("USE", root, tmp_path)
    metas = {document["meta"]["id"]: document["meta"] for document in made.documents}
    for entry in entries(made):
        assert entry["meta"] == {key: metas[entry["meta"]["id"]][key] for key in ("id", "id_task", "variant")}


def test_programs_run_only_where_that_is_allowed(root, tmp_path):
    made = run("ruHumanEval", root, tmp_path)
    assert not made.is_answered
    assert made.scores() is None
    record = made.records[0]
    assert record.texts == [write_text(record.context, seed) for seed in range(10)]

    class Silent(FakeModel):
        generate = None  # the programs are kept; nothing is asked again

    (document,) = (d for d in made.documents if d["meta"]["id"] == record.id)
    done = run("ruHumanEval", root, tmp_path, Silent(), allow_code=True)
    right = [text.startswith("    return x + ") and text.strip()[-1].isdigit() for text in record.texts]
    for text, found, is_right in zip(record.texts, done.records[0].answer, right, strict=True):
        if is_right:
            assert found == document["outputs"], text
    assert set(done.scores()) == {"pass@1", "pass@5", "pass@10"}
    assert entries(done)[0]["outputs"] == done.records[0].answer


def test_an_interrupted_run_goes_on(root, tmp_path):
    class Deaf(FakeModel):
        score = generate = None

    first = run("LCS", root, tmp_path)
    assert run("LCS", root, tmp_path, Deaf()).records == first.records
    for change in ({"limit": 3}, {"split": "labelled"}, {"identity": {"checkpoint": "other"}}):
        with pytest.raises(TypeError):
            run("LCS", root, tmp_path, Deaf(), **change)
    (tmp_path / "LCS.json").write_text("{")
    with pytest.raises(UserError, match=r"LCS.json is not readable; delete it"):
        run("LCS", root, tmp_path)


def test_other_documents_are_asked_anew(root, tmp_path):
    run("LCS", root, tmp_path)
    path = root / "data/lcs/public_test.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("Строки", "Две строки"), encoding="utf-8")
    assert "Две строки" in run("LCS", root, tmp_path).records[0].context


@pytest.mark.parametrize("task", [task for task in TASKS if task.examples], ids=lambda task: task.name)
def test_the_split_with_answers_is_scored(task, root, tmp_path):
    made = run(task.name, root, tmp_path, split="labelled", limit=4)
    assert len(made.records) == 4
    if task.metrics and task.kind != "code":
        assert set(task.metrics) <= set(made.scores())


def test_a_limit_may_be_a_share(root, tmp_path):
    half = run("LCS", root, tmp_path, limit=0.5)
    assert half.records == run("LCS", root, tmp_path / "all").records[:4] == run("LCS", root, tmp_path, limit=4).records


def test_without_answers_there_is_no_score(tmp_path):
    made = run("USE", mini_mera.write(tmp_path / "mera"), tmp_path)
    assert made.is_answered
    assert made.scores() is None


def test_progress_is_told(root, tmp_path):
    told = []
    for name in ("ruTiE", "ruHumanEval"):
        run(name, root, tmp_path, progress=lambda *line: told.append(line))
    assert told[:8] == [("ruTiE", number, 8) for number in range(1, 9)]
    assert told[8:] == [("ruHumanEval", 8 * number, 80) for number in range(1, 11)]


def test_the_zip_holds_its_files_at_the_root(tmp_path):
    for _ in range(2):
        write_zip(tmp_path / "submission.zip", {"USE.json": "{}", "BPS.json": '"б"'})
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert {name: archive.read(name).decode() for name in archive.namelist()} == {
            "BPS.json": '"б"',
            "USE.json": "{}",
        }
    assert [path.name for path in tmp_path.iterdir()] == ["submission.zip"]


def test_the_file_is_indented_and_readable():
    document = {"instruction": "", "inputs": "", "outputs": "", "meta": {"id": 7}}
    assert submission_json(TASK["CheGeKa"], [document], {7: "Тверь"}, [7]) == (
        '{\n    "data": {\n        "test": [\n            {\n                "outputs": "Тверь",\n'
        '                "meta": {\n                    "id": 7\n                }\n            }\n        ]\n    }\n}'
    )


def test_only_one_version_is_known():
    check_version("1.1.0")
    with pytest.raises(UserError, match=r"--mera-version 1\.2\.0: known is 1\.1\.0"):
        check_version("1.2.0")
