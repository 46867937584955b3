"""What repeats an evaluation item is found whatever its case, punctuation and ё, and nothing else is."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from written_texts import RUSSIAN, make_texts, write_jsonl

from tlite_jax.config import DecontaminationConfig, EvaluationSetConfig, RunConfig
from tlite_jax.data import words as words_module
from tlite_jax.data.buckets import BucketStore
from tlite_jax.data.decontaminate import decontaminate
from tlite_jax.data.evaluation_items import EvaluationItems, find_items
from tlite_jax.data.prepare import prepare
from tlite_jax.data.words import hash_words, ngrams, normalised
from tlite_jax.errors import UserError

QUESTION = "Какое растение учёный Пётр Ёлкин нашёл весной 1903 года у подножия горы, когда ещё лежал снег?"
SHORT = "Назовите девять самых длинных рек северной части страны."


def items_of(directory: Path, records: list[dict], **options) -> EvaluationItems:
    path = write_jsonl(directory / "eval.jsonl", records)
    found = EvaluationSetConfig(name="тест 1", paths=(str(path),), text_fields=("question",))
    items = find_items(DecontaminationConfig(sets=(found,), **options), directory / "items")
    items.build()
    return items


@pytest.fixture
def items(tmp_path: Path) -> EvaluationItems:
    return items_of(tmp_path, [{"question": QUESTION}, {"question": SHORT}, {"question": "Да или нет?"}])


WORD = st.text(alphabet="абёe-Z9\u0301", min_size=1, max_size=9)


@settings(deadline=None)  # the table of characters is made once
@given(st.lists(st.lists(WORD, max_size=20), max_size=5), st.integers(12, 40))
def test_words_are_where_they_are_said_to_be_however_texts_are_cut(texts: list[list[str]], piece: int) -> None:
    joined = [normalised(" ".join(words)) for words in texts] + ["слово"]
    whole = hash_words(joined)
    for number, start, end in zip(whole.texts, whole.starts, whole.ends, strict=True):
        assert joined[number][start:end].strip("- \u0301")
        assert "-" not in joined[number][start:end]
    assert joined[whole.texts[-1]][whole.starts[-1] : whole.ends[-1]] == "слово"
    before, words_module._PIECE = words_module._PIECE, piece
    try:
        cut = hash_words(joined)
    finally:
        words_module._PIECE = before
    for name in ("hashes", "starts", "ends", "texts"):
        assert np.array_equal(getattr(whole, name), getattr(cut, name))


def test_equal_words_have_equal_hashes_and_others_do_not() -> None:
    same = ["Ещё", "ЕЩЕ", "еще", "е\u0308ще", "Е\u0301щё"]
    hashes = hash_words([normalised(word) for word in same]).hashes
    assert len(set(hashes.tolist())) == 1
    others = hash_words(["щеё", "ще", "еще1", "ёж", "й", "и", "ab", "ba", "b", "a"]).hashes
    assert len(set(others.tolist()) | set(hashes.tolist())) == 11


def test_ngrams_never_cross_texts() -> None:
    words = hash_words(["a b c", "d e"])
    found = {n: first.tolist() for n, _, first in ngrams(words, 5)}
    assert found == {1: [0, 1, 2, 3, 4], 2: [0, 1, 3], 3: [0], 4: [], 5: []}


def test_a_copy_is_found_in_any_dress(items: EvaluationItems) -> None:
    dressed = QUESTION.upper().replace("Ё", "Е").replace(" ", "\n — ").replace(",", "")
    texts = ["Вступление. " + dressed + " Ответ.", " ".join(RUSSIAN), SHORT.lower().rstrip("."), *RUSSIAN]
    found = decontaminate(texts, items)
    assert sorted(found) == [0, 2]
    first = found[0]
    assert first.text is None
    assert (first.items, first.matches[0]["set"]) == (1, "тест 1")
    assert first.matches[0]["item"].endswith("eval.jsonl:1")
    assert first.matches[0]["words"].startswith("КАКОЕ\n — РАСТЕНИЕ")
    assert found[2].share == 1.0


def test_a_few_words_in_common_are_no_copy(items: EvaluationItems) -> None:
    words = QUESTION.split()
    assert not decontaminate([" ".join(words[:12]), " ".join(words[4:]), SHORT.replace("девять", "десять")], items)
    assert decontaminate([" ".join(words[:13])], items)
    assert decontaminate([" ".join(words[-13:])], items)


def test_below_the_share_the_copy_is_cut_out(tmp_path: Path) -> None:
    items = items_of(tmp_path, [{"question": QUESTION}], drop_above=0.5)
    around = " ".join(RUSSIAN[:6])
    found = decontaminate([f"{around}\nВопрос: {QUESTION} {around}", f"Вопрос: {QUESTION}"], items)
    assert found[0].text == f"{around}\nВопрос: ? {around}"
    assert 0 < found[0].share < 0.5
    assert found[1].text is None


def test_items_are_counted_and_what_is_wrong_with_them_is_said(items: EvaluationItems, tmp_path: Path) -> None:
    assert items.counts == {"тест 1": {"items": 3, "too_short": 1}}
    with pytest.raises(UserError, match=r"evaluation set тест 1: .*eval\.jsonl:2: no field 'question'; mend it"):
        items_of(tmp_path, [{"question": QUESTION}, {"q": "?"}], ngram_words=12)
    found = EvaluationSetConfig(name="x", paths=(str(tmp_path / "none.jsonl"),))
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl"):
        find_items(DecontaminationConfig(sets=(found,)), tmp_path)


def test_prepare_drops_cuts_lists_and_counts(
    run_config: Callable[..., RunConfig], tokenizer_dir: Path, tmp_path: Path
) -> None:
    texts = make_texts(RUSSIAN, 60, 0)
    long = " ".join(RUSSIAN)
    records = [{"text": text} for text in [*texts, f"{long} {QUESTION} {long}", QUESTION]]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    pyarrow.parquet.write_table(
        pa.table({"question": [QUESTION, "кратко"], "answer": [SHORT, ""]}), tmp_path / "e.parquet"
    )
    sets = [{"name": "quiz", "paths": [str(tmp_path / "*.parquet")], "text_fields": ["question", "answer"]}]
    sources = [
        {"name": "a", "paths": [str(path)]},
        {"name": "quiz", "paths": [str(write_jsonl(tmp_path / "q.jsonl", [{"text": QUESTION}]))], "training": False},
    ]
    todo = {"decontaminate": {"sets": sets, "drop_above": 0.5}, "shard_bytes": 4000}
    config = run_config(sources, prepare=todo)
    report = prepare(config, tokenizer_dir)
    assert report.contaminated == {"a": {"quiz": {"cut": 1, "dropped": 1}}, "quiz": {}}
    assert report.evaluation_items == {"quiz": {"items": 2, "too_short": 1}}
    assert report.documents_read == 62, "what is evaluated on keeps its items"
    lines = [json.loads(line) for line in (config.data.buckets / "contamination.jsonl").read_text().splitlines()]
    assert [(line["file"], line["line"], line["action"]) for line in lines] == [
        (str(path), 61, "cut"),
        (str(path), 62, "dropped"),
    ]
    assert lines[0]["matches"] == [
        {"set": "quiz", "item": f"{tmp_path}/e.parquet:1", "words": " ".join(QUESTION.split()[:13]).rstrip(",")}
    ]
    bucket = BucketStore.open(config.data.buckets).buckets["a"]
    rows = np.concatenate([bucket.read_row(row)[: bucket.num_tokens(row)] for row in range(bucket.manifest["rows"])])
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    assert QUESTION[:40] not in tokenizer.decode(rows.tolist())
    assert prepare(config, tokenizer_dir).reused
    pyarrow.parquet.write_table(pa.table({"question": [QUESTION], "answer": [SHORT]}), tmp_path / "e.parquet")
    with pytest.raises(UserError, match=r"made from something else .*decontaminate"):
        prepare(config, tokenizer_dir)
