"""The dataset in every layout it is found in, and what is said of one that is broken."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from bench import mini_mera
from tlite_jax.errors import UserError
from tlite_jax.evaluate.mera import documents as module
from tlite_jax.evaluate.mera.documents import download, has_answer, load_documents
from tlite_jax.evaluate.mera.tasks import TASKS

TASK = {task.name: task for task in TASKS}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_parquet_holds_what_jsonl_does(task, tmp_path):
    """The hub's own conversion lies in TASK/SPLIT/0000.parquet."""
    root = mini_mera.write(tmp_path / "mera", answers=True)
    for path in root.glob("data/*/*.jsonl"):
        split = "validation" if path.stem == "dev" else path.stem
        converted = tmp_path / "parquet" / path.parent.name / split / "0000.parquet"
        converted.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows_of(path)), converted)
    expected = load_documents(root, task, "test")
    assert load_documents(tmp_path / "parquet", task, "test") == expected
    assert len(expected) == 8
    assert all(has_answer(task, document) for document in expected)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_test_split_has_no_answers(task, tmp_path):
    documents = load_documents(mini_mera.write(tmp_path), task, "test")
    assert not any(has_answer(task, document) for document in documents)


def test_other_names_of_splits_and_folders(tmp_path):
    root = mini_mera.write(tmp_path)
    assert len(load_documents(root, TASK["USE"], "validation")) == 8  # dev.jsonl
    # Until April 2024 the splits "public_test" were called "train".
    (root / "data/lcs/public_test.jsonl").rename(root / "data/lcs/train.jsonl")
    assert len(load_documents(root, TASK["LCS"], "labelled")) == 24
    (root / "data/ruopenbookqa").rename(root / "ruopenbook")
    assert len(load_documents(root, TASK["ruOpenBookQA"], "test")) == 8
    (root / "data/bps/test.jsonl").rename(root / "part.jsonl")
    rows = rows_of(root / "part.jsonl")
    for number, part in enumerate((rows[:5], rows[5:])):
        name = root / f"data/bps/test-0000{number}-of-00002.parquet"
        pyarrow.parquet.write_table(pa.Table.from_pylist(part), name)
    assert load_documents(root, TASK["BPS"], "test") == rows


def test_programs_tests_may_be_lists(tmp_path):
    row = {
        "instruction": "{function}",
        "inputs": {"function": "def f(x):", "tests": [{"x": [1, None]}]},
        "outputs": [2],
        "meta": {"id": 0, "entry_point": "f"},
    }
    write_rows(tmp_path / "ruhumaneval/test.jsonl", [row])
    (document,) = load_documents(tmp_path, TASK["ruHumanEval"], "test")
    assert document["inputs"]["tests"] == "[{'x': [1, None]}]"
    assert document["outputs"] == ["2"]


def test_a_dialogue_is_sorted_and_whole(tmp_path):
    root = mini_mera.write(tmp_path)
    path = root / "data/rutie/test.jsonl"
    rows = rows_of(path)
    write_rows(path, rows[::-1])
    assert load_documents(root, TASK["ruTiE"], "test") == rows
    write_rows(path, rows[1:])
    with pytest.raises(UserError, match="question_id must run from 0 without a gap"):
        load_documents(root, TASK["ruTiE"], "test")


def test_a_missing_split_says_where_it_should_be(tmp_path):
    root = mini_mera.write(tmp_path)
    with pytest.raises(
        UserError, match=r"BPS: no validation or dev documents in .*expected .*data/bps/validation.jsonl"
    ):
        load_documents(root, TASK["BPS"], "validation")
    with pytest.raises(UserError, match=r"USE: no test .*give --mera a copy of the dataset ai-forever/MERA"):
        load_documents(root / "elsewhere", TASK["USE"], "test")
    with pytest.raises(UserError, match="ruEthics has only test documents"):
        load_documents(root, TASK["ruEthics"], "labelled")


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("BPS", {"meta": {}}, r"BPS document in line 3 .*no meta.id; is this MERA's bps"),
        ("BPS", {"instruction": None}, r"BPS document 2 .*instruction is not a string"),
        ("BPS", {"inputs": 5}, r"BPS document 2 .*inputs is neither a string nor an object"),
        ("BPS", {"outputs": "да"}, r"BPS document 2 .*outputs is 'да'; possible are 1, 0"),
        ("BPS", {"outputs": 1}, r"BPS document 2 .*outputs is int, not a string"),
        ("BPS", {"meta": {"id": 1}}, r"BPS document 1 .*the id is given twice"),
        ("MultiQ", {"outputs": "Тверь"}, r"MultiQ document 2 .*outputs is not a list of spans"),
        ("MultiQ", {"inputs": {"text": "а"}}, r"MultiQ document 2 .*no inputs.support_text"),
        ("USE", {"meta": {"id": 2, "id_task": "1", "variant": 0}}, r"USE document 2 .*no meta.type"),
        ("USE", {"meta": {"id": 2, "id_task": "1", "variant": 0, "type": "эссе"}}, r"USE document 2 .*is 'эссе'"),
        ("ruMMLU", {"meta": {"id": 2}}, r"ruMMLU document 2 .*no meta.domain"),
    ],
)
def test_a_broken_document_is_named(name, change, error, tmp_path):
    root = mini_mera.write(tmp_path, answers=True)
    path = root / "data" / TASK[name].folder / "test.jsonl"
    rows = rows_of(path)
    write_rows(path, [*rows[:2], {**rows[2], **change}, *rows[3:]])
    with pytest.raises(UserError, match=error):
        load_documents(root, TASK[name], "test")


def test_files_that_are_not_what_they_seem(tmp_path):
    root = mini_mera.write(tmp_path)
    path = root / "data/bps/test.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"bps/test.jsonl: document 8 is not JSON"):
        load_documents(root, TASK["BPS"], "test")
    path.write_text("[1]\n")
    with pytest.raises(UserError, match=r"BPS document in line 1 .*no meta.id"):
        load_documents(root, TASK["BPS"], "test")
    path.write_text("")
    with pytest.raises(UserError, match="holds no document of BPS"):
        load_documents(root, TASK["BPS"], "test")
    path.unlink()
    path.with_suffix(".parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is not readable parquet"):
        load_documents(root, TASK["BPS"], "test")


def test_the_hub_gives_its_jsonl_files(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repository, **options):
        asked[repository] = options
        return str(mini_mera.write(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_documents(download("main"), TASK["BPS"], "test")
    assert asked == {"ai-forever/MERA": {"repo_type": "dataset", "revision": "main", "allow_patterns": ["data/*"]}}


def test_without_the_hub_a_copy_is_asked_for():
    assert module.REPOSITORY == "ai-forever/MERA"
    with pytest.raises(UserError, match=r"cannot download ai-forever/MERA: .*give --mera DIRECTORY"):
        download(None)  # conftest.py sets HF_HUB_OFFLINE
