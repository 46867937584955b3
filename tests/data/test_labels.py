"""Labellers: each kind, what it refuses, and buckets that know what labelled them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import typer
from typer.testing import CliRunner
from written_texts import ENGLISH, RUSSIAN, make_texts, write_jsonl

from launch import label as command
from tlite_jax.config import RunConfig
from tlite_jax.config.labels import (
    ClassifierLabellerConfig,
    ColumnLabellerConfig,
    LanguageLabellerConfig,
    PythonLabellerConfig,
)
from tlite_jax.data.documents import BadDocument, Document
from tlite_jax.data.labels.labeller import text_hash
from tlite_jax.data.labels.labelling import Labellers, Labelling
from tlite_jax.data.labels.model import TextModel
from tlite_jax.data.prepare import prepare
from tlite_jax.errors import UserError

Build = Callable[..., RunConfig]
UKRAINIAN = "Вранці над річкою стояв густий туман, і рибалки не поспішали відв'язувати човни."
BELARUSIAN = "Раніцай над ракой стаяў густы туман, і рыбакі не спяшаліся адвязваць лодкі."
BULGARIAN = "Сутринта над реката имаше гъста мъгла и рибарите не бързаха да отвържат лодките."


def documents(*texts: str, **labels: str) -> list[Document]:
    return [Document(text, {"source": "s", **labels}, line, f"id-{line}") for line, text in enumerate(texts, 1)]


def labels_of(found: list, label: str) -> list[str]:
    return [document.labels[label] for document in found]


def test_languages_that_share_an_alphabet_are_told_apart(tmp_path: Path) -> None:
    labellers = Labellers([LanguageLabellerConfig(kind="language")], tmp_path)
    found = labellers.apply("s", documents(*RUSSIAN, *ENGLISH, UKRAINIAN, BELARUSIAN, BULGARIAN))
    assert labels_of(found, "language") == ["ru"] * len(RUSSIAN) + ["en"] * len(ENGLISH) + ["uk", "be", "bg"]


def test_what_is_uncertain_is_unknown_and_what_is_known_stays(tmp_path: Path) -> None:
    sure = LanguageLabellerConfig(kind="language", min_confidence=0.9)
    (short,) = Labellers([sure], tmp_path).apply("s", documents("4 8 15 16 23 42"))
    assert short.labels["language"] == "unknown"
    (given,) = Labellers([sure], tmp_path).apply("s", documents(RUSSIAN[0], language="xx"))
    assert given.labels["language"] == "xx"
    replacing = sure.model_copy(update={"replace": True})
    assert labels_of(Labellers([replacing], tmp_path).apply("s", documents(RUSSIAN[0], language="xx")), "language") == [
        "ru"
    ]
    elsewhere = sure.model_copy(update={"sources": ("other",)})
    (left,) = Labellers([elsewhere], tmp_path).apply("s", documents(RUSSIAN[0]))
    assert "language" not in left.labels
    two = sure.model_copy(update={"languages": ("bg", "en")})
    assert labels_of(Labellers([two], tmp_path).apply("s", documents(RUSSIAN[0])), "language") == ["bg"]
    with pytest.raises(UserError, match="no language 'xx'; there are"):
        Labellers([sure.model_copy(update={"languages": ("xx",)})], tmp_path)


@pytest.fixture
def styled(tmp_path: Path) -> Path:
    """300 distinct documents of two styles, told apart by their sentences."""
    records = [{"text": text, "style": "manual"} for text in make_texts(RUSSIAN[2::5], 150, 1)]
    records += [{"text": text, "style": "story"} for text in make_texts(RUSSIAN[0::5], 150, 2)]
    return write_jsonl(tmp_path / "styled.jsonl", records)


def call(*words: str) -> str:
    app = typer.Typer()
    app.add_typer(command.app, name="label")
    result = CliRunner().invoke(app, ["label", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def train(styled: Path, out: Path, *words: str) -> dict[str, Any]:
    return json.loads(call("train", str(styled), "--label", "style", "--out", str(out), "--json", *words))


def test_a_classifier_is_trained_scored_and_applied(styled: Path, tmp_path: Path) -> None:
    found = train(styled, tmp_path / "style.npz", "--held-out", "0.2")
    assert found["accuracy"] > 0.95 > found["most_frequent_class"]
    assert [score["name"] for score in found["classes"]] == ["manual", "story"]
    assert sum(score["documents"] for score in found["classes"]) == found["documents"] > 30
    table = call("train", str(styled), "--label", "style", "--out", str(tmp_path / "again.npz"), "--held-out", "0.2")
    assert "accuracy" in table
    assert "precision" in table
    assert f"hash {found['hash']}" in table, "the same documents give the same model"
    out = tmp_path / "labels.jsonl"
    counts = json.loads(call("apply", str(tmp_path / "style.npz"), str(styled), "--out", str(out), "--json"))["counts"]
    assert abs(counts["manual"] - 150) < 6
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0]["hash"] == text_hash(json.loads(styled.read_text().splitlines()[0])["text"])
    assert sum(line["style"] == "manual" for line in lines) == counts["manual"]
    config = ColumnLabellerConfig(
        kind="column", label="style", paths=(str(out),), column="style", key_column="hash", key="hash"
    )
    texts = [json.loads(line)["text"] for line in styled.read_text().splitlines()]
    joined = Labellers([config], tmp_path / "index").apply("s", documents(*texts))
    assert labels_of(joined, "style") == [line["style"] for line in lines]


def test_training_depends_on_the_documents_alone(styled: Path, tmp_path: Path) -> None:
    lines = styled.read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([*lines[::-1], *lines[:40]]) + "\n")
    first, second = train(styled, tmp_path / "a.npz"), train(other, tmp_path / "b.npz")
    assert first["hash"] == second["hash"]
    assert train(styled, tmp_path / "c.npz", "--ngrams", "1", "3")["hash"] != first["hash"]


def test_a_damaged_or_foreign_model_is_refused(styled: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.npz"
    train(styled, path)
    model = TextModel.load(path)
    assert model.facts["held_out_accuracy"] > 0.9
    with np.load(path) as file:
        parts = dict(file)
    meta = json.loads(parts["meta"].tobytes())
    for change, complaint in (
        ({"model_version": 9}, "model of version 9, this program reads 1"),
        ({"classes": ["story", "manual"]}, "does not match its hash"),
        ({"features": {"bits": 2}}, "does not match its hash"),
        ({"features": {"nonsense": 2}}, "no model, or damaged"),
    ):
        text = np.frombuffer(json.dumps({**meta, **change}).encode(), np.uint8)
        np.savez_compressed(tmp_path / "other.npz", **{**parts, "meta": text})
        with pytest.raises(UserError, match=complaint):
            TextModel.load(tmp_path / "other.npz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="no model, or damaged"):
        TextModel.load(path)
    with pytest.raises(UserError, match="cannot read the model"):
        TextModel.load(tmp_path / "none.npz")


def test_what_cannot_be_learnt_is_refused(styled: Path, tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": text, "style": "a"} for text in RUSSIAN])
    with pytest.raises(UserError, match="label 'style' has 1 value"):
        train(one, tmp_path / "m.npz")
    lines = [*styled.read_text().splitlines(), json.dumps({"text": "совсем другое", "style": "rare"})]
    rare = tmp_path / "rare.jsonl"
    rare.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"style=rare has 1 distinct documents, none of them to (hold out|train on)"):
        train(rare, tmp_path / "m.npz")
    assert not (tmp_path / "m.npz").exists()


def test_scores_in_a_column_become_labels(tmp_path: Path) -> None:
    table = pa.table({"doc": ["id-1", "id-2", "id-3", "id-9"], "score": [0.95, 0.5, -3.0, 0.1]})
    pyarrow.parquet.write_table(table, tmp_path / "scores.parquet")
    config = ColumnLabellerConfig(
        kind="column",
        label="quality",
        paths=(str(tmp_path / "*.parquet"),),
        column="score",
        key_column="doc",
        thresholds={"high": 0.8, "mid": 0.4, "low": 0.0},
    )
    found = Labellers([config], tmp_path / "i").apply("s", documents("a", "b", "c", "d"))
    assert labels_of(found, "quality") == ["high", "mid", "unknown", "unknown"]
    strict = config.model_copy(update={"missing": "quarantine"})
    found = Labellers([strict], tmp_path / "i").apply("s", documents("a", "b", "c", "d"))
    assert found[3] == BadDocument("no value in the label's column", 4)
    without = Labellers([strict], tmp_path / "i").apply("s", [Document("a", {}, 1)])
    assert without == [BadDocument("no id", 1)]


@pytest.mark.parametrize(
    ("record", "change", "complaint"),
    [
        ({"id": "a", "score": "good"}, {"thresholds": {"x": 0.0}}, r"scores\.jsonl:1: 'score' is 'good', not a number"),
        ({"id": "a", "score": 0.5}, {}, "'score' is 0.5, which is no label; numbers need thresholds"),
        ({"id": "a"}, {}, "has no field 'score'"),
        ({"id": "b", "score": "two"}, {}, "a 'id' has two different values"),
    ],
)
def test_columns_that_cannot_be_joined_are_refused(record: dict, change: dict, complaint: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "scores.jsonl", [record, {"id": "b", "score": "one"}])
    config = ColumnLabellerConfig(kind="column", label="q", paths=(str(path),), column="score")
    labellers = Labellers([config.model_copy(update=change)], tmp_path / "i")
    with pytest.raises(UserError, match=complaint):
        labellers.apply("s", documents("x"))


class Shouting:
    """A labeller of a user's own."""

    labels = ("loud",)

    def __init__(self, mark: str = "!") -> None:
        self._mark = mark

    def fingerprint(self) -> str:
        return f"shouting {self._mark}"

    def label(self, documents: list[Document]) -> list[dict[str, str] | str]:
        return [
            "too loud" if document.text.count(self._mark) > 2 else {"loud": str(self._mark in document.text).lower()}
            for document in documents
        ]


def test_a_users_own_labeller_is_run(tmp_path: Path) -> None:
    config = PythonLabellerConfig(kind="python", target="test_labels:Shouting", options={"mark": "?"})
    found = Labellers([config], tmp_path).apply("s", documents("a", "b?", "c???"))
    assert labels_of(found[:2], "loud") == ["false", "true"]
    assert found[2] == BadDocument("too loud", 3)
    for target, complaint in (("nowhere:X", "No module named"), ("json:JSONDecoder", "has no labels")):
        with pytest.raises(UserError, match=complaint):
            Labellers([PythonLabellerConfig(kind="python", target=target)], tmp_path)


def test_what_labelled_them_is_part_of_what_buckets_are(
    styled: Path, run_config: Build, tokenizer_dir: Path, tmp_path: Path
) -> None:
    texts = [{"text": text} for text in (*make_texts(RUSSIAN, 60, 5), *make_texts(ENGLISH, 60, 6))]
    sources = [{"name": "web", "paths": [str(write_jsonl(tmp_path / "web.jsonl", texts))]}]
    model = tmp_path / "style.npz"
    train(styled, model)
    labellers = [{"kind": "language"}, {"kind": "classifier", "path": str(model), "min_confidence": 0.6}]
    config = run_config(sources, prepare={"labellers": labellers, "bucket_labels": ["language", "style"]})
    report = prepare(config, tokenizer_dir)
    assert {bucket.labels["language"] for bucket in report.buckets} == {"ru", "en"}
    assert report.label_counts["language"] == {"en": 60, "ru": 60}
    assert sum(report.label_counts["style"].values()) == 120
    assert prepare(config, tokenizer_dir).reused
    moved = Path(model.rename(tmp_path / "moved.npz"))
    labellers[1]["path"] = str(moved)
    again = run_config(sources, prepare={"labellers": labellers, "bucket_labels": ["language", "style"]})
    assert prepare(again, tokenizer_dir).reused, "where the model lies does not matter"
    train(styled, moved, "--ngrams", "1", "3")
    with pytest.raises(UserError, match=r"made from something else \(labellers"):
        prepare(again, tokenizer_dir)


def test_a_labeller_that_changes_midway_is_refused(styled: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.npz"
    train(styled, path)
    labelling = Labelling.of([ClassifierLabellerConfig(kind="classifier", path=path)], tmp_path)
    train(styled, path, "--ngrams", "1", "2")
    with pytest.raises(UserError, match="a labeller has changed since"):
        labelling.open()
