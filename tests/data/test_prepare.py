"""From files to buckets: the same bytes whatever the workers, nothing lost unsaid, nothing half-written."""

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
from written_texts import ENGLISH, RUSSIAN, make_texts, write_jsonl

from tlite_jax.config import RunConfig
from tlite_jax.data import join, write_buckets
from tlite_jax.data import prepare as prepare_module
from tlite_jax.data.assemble import Assembler
from tlite_jax.data.buckets import BucketStore, read_held_out
from tlite_jax.data.documents import Shard
from tlite_jax.data.preparation import Preparation
from tlite_jax.data.prepare import prepare
from tlite_jax.errors import UserError

Build = Callable[..., RunConfig]

RU, EN, UNSEEN = make_texts(RUSSIAN, 120, 0), make_texts(ENGLISH, 90, 1), make_texts(RUSSIAN, 15, 2)


@pytest.fixture
def sources(tmp_path: Path) -> list[dict]:
    styles = ("web", "books", "весна/осень")
    records = [{"text": text, "style": styles[i % 3]} for i, text in enumerate(RU)]
    ru = write_jsonl(tmp_path / "ru.jsonl", [*records, *records[:7]])
    en = write_jsonl(tmp_path / "en.jsonl", [{"body": text} for text in [*EN, UNSEEN[0]]])
    unseen = write_jsonl(tmp_path / "unseen.jsonl", [{"text": text} for text in UNSEEN])
    return [
        {"name": "ru", "paths": [str(ru)], "labels": {"language": "ru"}, "label_fields": {"style": "style"}},
        {"name": "en", "paths": [str(en)], "labels": {"language": "en"}, "text_field": "body"},
        {"name": "unseen", "paths": [str(unseen)], "labels": {"language": "ru"}, "training": False},
    ]


def decoded(tokenizer_dir: Path, tokens: np.ndarray) -> str:
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def training_texts(directory: Path, tokenizer_dir: Path) -> dict[str, list[str]]:
    """The documents that can be trained on, read back from rows."""
    result = {}
    for name, bucket in BucketStore.open(directory).buckets.items():
        rows = [bucket.read_row(row)[: bucket.num_tokens(row)] for row in range(bucket.manifest["rows"])]
        text = decoded(tokenizer_dir, np.concatenate(rows)) if rows else ""
        result[name] = [part.removesuffix("<|end|>") for part in text.split("<|begin|>")[1:]]
    return result


def test_every_document_is_in_one_place(sources: list[dict], run_config: Build, tokenizer_dir: Path) -> None:
    config = run_config(sources)
    report = prepare(config, tokenizer_dir)
    trained = training_texts(config.data.buckets, tokenizer_dir)
    (mixed,) = set(trained) - {"ru.ru.web", "ru.ru.books", "en.en", "unseen.ru"}
    assert mixed.startswith("ru.ru._-"), "a label that is not a file name has a hash instead"
    held = {bucket.name: bucket for bucket in read_held_out(config.data.buckets)}
    aside = [decoded(tokenizer_dir, doc.tokens[1:-1]) for bucket in held.values() for doc in bucket.documents]
    in_training = [text for texts in trained.values() for text in texts]
    assert sorted(aside + in_training) == sorted(RU + EN + UNSEEN)
    # The text that is also in the never-trained source was removed from training, not from evaluation.
    assert [name for name, bucket in held.items() if bucket.never_trained] == ["unseen.ru"]
    assert trained["unseen.ru"] == []
    assert UNSEEN[0] not in in_training
    for bucket in held.values():
        for doc in bucket.documents:
            assert doc.num_bytes == len(decoded(tokenizer_dir, doc.tokens[1:-1]).encode())
    by_name = {bucket.name: bucket for bucket in report.buckets}
    assert sum(bucket.exact_duplicates for bucket in report.buckets) == 8
    assert by_name["en.en"].exact_duplicates == 1
    assert report.documents_read == 120 + 7 + 91 + 15
    for bucket in report.buckets:
        assert bucket.documents == len(trained[bucket.name])
        assert bucket.rows * 64 == bucket.tokens + bucket.padding_tokens
        assert bucket.never_trained or 0 < bucket.held_out_documents < bucket.documents
    removed = [json.loads(line) for line in (config.data.buckets / "duplicates.jsonl").read_text().splitlines()]
    assert {"removed": "ru.jsonl:121", "kept": "ru.jsonl:1", "kind": "exact"} in [
        {**line, "removed": Path(line["removed"]).name, "kept": Path(line["kept"]).name} for line in removed
    ]


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_workers_and_shards_that_were_done_change_no_byte(
    sources: list[dict], run_config: Build, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "SMALL_BYTES", 0)
    monkeypatch.setattr(write_buckets, "SMALL_TOKENS", 0)
    near = {"near_duplicates": {"threshold": 0.8}}
    results = []
    for workers, shard_bytes in ((1, 1 << 20), (2, 5000)):
        todo = {"num_workers": workers, "shard_bytes": shard_bytes, **near}
        config = run_config(sources, prepare=todo, buckets=str(tmp_path / f"b{workers}"))
        prepare(config, tokenizer_dir)
        results.append(snapshot(config.data.buckets))
    assert results[0] == results[1]
    assert any(name.endswith("tokens.bin") and len(data) > 1000 for name, data in results[0].items())


def test_an_interrupted_one_goes_on(
    sources: list[dict], run_config: Build, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_config(sources, buckets=str(tmp_path / "whole"))
    prepare(whole, tokenizer_dir)
    config = run_config(sources)
    original, read = prepare_module.tokenize_shard, []

    def interrupted(shard: Shard, *rest: object) -> Path:
        read.append(shard.source.name)
        if shard.source.name == "unseen":
            raise KeyboardInterrupt
        return original(shard, *rest)

    monkeypatch.setattr(prepare_module, "tokenize_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tokenizer_dir)
    with pytest.raises(UserError, match="no finished buckets"):
        BucketStore.open(config.data.buckets)
    monkeypatch.setattr(prepare_module, "tokenize_shard", original)
    # Interrupted again while buckets are written.
    monkeypatch.setattr(Assembler, "write", _second_fails(Assembler.write))
    # The shards of before are there: their files are not read again.
    reads: list[str] = []
    monkeypatch.setattr("tlite_jax.data.shards.read_piece", _noting(reads))
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tokenizer_dir)
    assert reads == ["unseen"]
    with pytest.raises(UserError, match="no finished buckets"):
        BucketStore.open(config.data.buckets)
    monkeypatch.undo()
    assert not prepare(config, tokenizer_dir).reused
    assert snapshot(config.data.buckets) == snapshot(whole.data.buckets)


def _second_fails(write: Callable) -> Callable:
    calls = []

    def failing(*arguments: object) -> str:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    return failing


def _noting(reads: list[str]) -> Callable:
    from tlite_jax.data.documents import read_piece

    def noting(source, *rest: object) -> Iterator:
        reads.append(source.name)
        return read_piece(source, *rest)

    return noting


def test_made_already_is_found_and_made_otherwise_is_refused(
    sources: list[dict], run_config: Build, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = run_config(sources)
    first = prepare(config, tokenizer_dir)
    before = snapshot(config.data.buckets)
    again = prepare(run_config(sources, prepare={"num_workers": 5, "max_quarantine_rate": 0.5}), tokenizer_dir)
    assert again.reused
    assert again.buckets == first.buckets
    other = run_config(sources, prepare={"held_out": {"fraction": 0.2}}, sequence_length=32, document_end=None)
    with pytest.raises(UserError, match="made from something else") as caught:
        prepare(other, tokenizer_dir)
    for difference in ("sequence_length: 64 -> 32", "document_end: 1 -> null", "held_out.fraction: 0.05 -> 0.2"):
        assert difference in str(caught.value)
    write_jsonl(tmp_path / "unseen.jsonl", [{"text": "другой текст"}])
    with pytest.raises(UserError, match="the files of source unseen"):
        prepare(config, tokenizer_dir)
    assert snapshot(config.data.buckets) == before
    forced = prepare(config, tokenizer_dir, force=True)
    assert not forced.reused
    assert prepare(config, tokenizer_dir).reused


def test_damage_is_not_taken_for_made_already(sources: list[dict], run_config: Build, tokenizer_dir: Path) -> None:
    config = run_config(sources)
    prepare(config, tokenizer_dir)
    (config.data.buckets / "en.en" / "tokens.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"en\.en/tokens\.bin is damaged"):
        prepare(config, tokenizer_dir)
    assert not prepare(config, tokenizer_dir, force=True).reused


def test_bad_documents_are_listed_and_too_many_stop_it(run_config: Build, tokenizer_dir: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in RU]
    lines[10], lines[90] = b"{oops", b'{"text": "\xff"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    strict = run_config([{"name": "a", "paths": [str(path)]}], prepare={"shard_bytes": 2000})
    with pytest.raises(UserError, match=r"2 of 120 documents are bad.*quarantine\.jsonl.*max_quarantine_rate"):
        prepare(strict, tokenizer_dir)
    with pytest.raises(UserError, match="no finished buckets"):
        BucketStore.open(strict.data.buckets)
    config = run_config(
        [{"name": "a", "paths": [str(path)]}], prepare={"max_quarantine_rate": 0.02, "shard_bytes": 2000}
    )
    report = prepare(config, tokenizer_dir)
    assert report.quarantined == {"a": {"malformed JSON": 1, "invalid UTF-8": 1}}
    listed = [json.loads(line) for line in (config.data.buckets / "quarantine.jsonl").read_text().splitlines()]
    starts = [path.read_bytes().index(line) for line in (b"{oops", b'{"text": "\xff')]
    assert listed == [
        {"source": "a", "file": str(path), "reason": "malformed JSON", "line": 11, "offset": starts[0]},
        {"source": "a", "file": str(path), "reason": "invalid UTF-8", "line": 91, "offset": starts[1]},
    ]


def test_a_damaged_file_is_set_aside_up_to_the_rate(run_config: Build, tokenizer_dir: Path, tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": text} for text in RU])
    damaged = tmp_path / "damaged.jsonl.gz"
    # Two members, the second broken at its beginning: all of it is lost.
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in EN]
    whole = [gzip.compress(lines[0]), gzip.compress(b"".join(lines[1:]))]
    damaged.write_bytes(whole[0] + b"\x1f\x8b\xff" + whole[1][3:])
    lost = len(whole[1])
    total = good.stat().st_size + damaged.stat().st_size
    source = {"name": "a", "paths": [str(good), str(damaged)]}
    with pytest.raises(UserError, match=rf"{lost:,} of {total:,} bytes of input cannot be read: damaged files; mend"):
        prepare(run_config([source], prepare={"max_quarantine_rate": 0.01}), tokenizer_dir)
    assert lost / total > 0.01 > 1 / 122
    report = prepare(run_config([source], prepare={"max_quarantine_rate": 0.1}), tokenizer_dir)
    assert report.quarantined == {"a": {"damaged gzip file": 1}}
    (line,) = [json.loads(line) for line in (tmp_path / "buckets" / "quarantine.jsonl").read_text().splitlines()]
    assert (line["file"], line["line"], line["lost_bytes"]) == (str(damaged), 2, lost)
    assert report.documents_read == 121


def test_near_duplicates_go_and_are_listed(run_config: Build, tokenizer_dir: Path, tmp_path: Path) -> None:
    base = " ".join(RUSSIAN)
    texts = [*RU, base, base + " И ещё одно слово.", base.replace("Поезд", "Автобус")]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    config = run_config(
        [{"name": "a", "paths": [str(path)]}],
        prepare={"near_duplicates": {"threshold": 0.7, "ngram_words": 3}, "held_out": {"fraction": 0.3}},
    )
    (bucket,) = prepare(config, tokenizer_dir).buckets
    assert bucket.near_duplicates >= 2
    assert bucket.documents + bucket.held_out_documents + bucket.near_duplicates == len(texts)
    lines = [json.loads(line) for line in (config.data.buckets / "duplicates.jsonl").read_text().splitlines()]
    kept = {line["removed"].rsplit(":", 1)[1]: line["kept"].rsplit(":", 1)[1] for line in lines}
    assert kept["122"] == kept["123"] == "121"
    assert all(line["kind"] == "near" and line["similarity"] >= 0.7 for line in lines)


def test_places_are_right_behind_a_damaged_row_group(run_config: Build, tokenizer_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([{"text": text} for text in [*RU[:60], RU[3]]])
    pyarrow.parquet.write_table(table, path, row_group_size=10, use_dictionary=False, write_page_checksum=True)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 20] ^= 8
    path.write_bytes(data)
    todo = {"max_quarantine_rate": 0.5, "shard_bytes": 2000}
    config = run_config([{"name": "a", "paths": [str(path)]}], prepare=todo)
    report = prepare(config, tokenizer_dir)
    assert report.quarantined == {"a": {"damaged parquet row group": 10}}
    (removed,) = [json.loads(line) for line in (config.data.buckets / "duplicates.jsonl").read_text().splitlines()]
    assert (removed["removed"], removed["kept"]) == (f"{path}:61", f"{path}:4")


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "signatures.bin", "bands.bin", "quarantine.jsonl"])
def test_a_flipped_bit_in_a_finished_shard_is_not_joined(
    name: str, run_config: Build, tokenizer_dir: Path, tmp_path: Path
) -> None:
    texts = [*RU[:20], " ".join(RUSSIAN), " ".join(RUSSIAN) + " И ещё слово."]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in [*texts, ""]])
    todo = {"near_duplicates": {"threshold": 0.7}, "max_quarantine_rate": 0.1}
    config = run_config([{"name": "a", "paths": [str(path)]}], prepare=todo)

    def flip(preparation: Preparation, progress: Callable) -> None:
        prepare_module.run_here(preparation, progress)
        (shard,) = (config.data.buckets / ".shards").glob(f"[0-9a-f]*/{name}")
        data = bytearray(shard.read_bytes())
        data[-2 if name == "quarantine.jsonl" else len(data) // 2] ^= 4
        shard.write_bytes(data)

    with pytest.raises(UserError, match=rf"{name} is damaged; remove .* and start again"):
        prepare(config, tokenizer_dir, run_shards=flip)
    shutil.rmtree(next((config.data.buckets / ".shards").glob(f"[0-9a-f]*/{name}")).parent)
    assert prepare(config, tokenizer_dir).documents_read == 22


def test_a_source_of_duplicates_only_is_said(run_config: Build, tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in RU])
    copy = write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in RU[:9]])
    config = run_config([{"name": "a", "paths": [str(path)]}, {"name": "b", "paths": [str(copy)]}])
    first, second = prepare(config, tokenizer_dir).buckets
    assert (first.name, first.exact_duplicates) == ("a", 0)
    assert (second.name, second.exact_duplicates, second.documents, second.rows) == ("b", 9, 0, 0)
    assert [info.name for info in BucketStore.open(config.data.buckets).infos()] == ["a"]


def test_special_tokens_are_read_where_a_source_says_so(run_config: Build, tokenizer_dir: Path, tmp_path: Path) -> None:
    sources = []
    for name, parse in (("plain", False), ("chat", True)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} <|turn|> {text}"} for text in RU[:20]])
        sources.append({"name": name, "paths": [str(path)], "parse_special_tokens": parse})
    config = run_config(sources)
    prepare(config, tokenizer_dir)
    buckets = BucketStore.open(config.data.buckets).buckets
    turns = {
        name: sum((bucket.read_row(row) == 2).sum() for row in range(bucket.manifest["rows"]))
        for name, bucket in buckets.items()
    }
    assert turns == {"plain": 0, "chat": buckets["chat"].manifest["documents"]}


def test_what_cannot_be_prepared_is_refused(
    sources: list[dict], run_config: Build, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(config: RunConfig, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            prepare(config, tokenizer_dir)
        assert "\n" not in str(caught.value)

    missing = [{**sources[0], "paths": [str(tmp_path / "none.jsonl")]}]
    refused(run_config(missing), "cannot read .*none.jsonl: No such file")
    refused(run_config(sources, vocab_size=100), "tokenizer and model disagree")
    assert not (tmp_path / "buckets").exists()
    (tmp_path / "empty.jsonl").write_bytes(b"")
    empty = [{"name": "e", "paths": [str(tmp_path / "empty.jsonl")]}]
    refused(run_config(empty), "no documents in e: the files are empty")
    (tmp_path / "file").write_text("x")
    refused(run_config(sources, buckets=str(tmp_path / "file" / "b")), "cannot write buckets to .*Not a directory")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refused(run_config(sources, buckets=str(tmp_path / "mine")), r"holds thesis\.tex, which prepare did not write")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    monkeypatch.setattr(join, "MAX_BUCKETS", 3)
    refused(run_config(sources), "5 buckets: label .* has 3 values; leave it out of data.prepare.bucket_labels")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_an_unwritable_output_is_refused(
    sources: list[dict], run_config: Build, tokenizer_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot write buckets to .*Permission denied"):
        prepare(run_config(sources, buckets=str(tmp_path / "locked")), tokenizer_dir)


def test_two_at_once_are_refused(sources: list[dict], run_config: Build, tokenizer_dir: Path) -> None:
    config = run_config(sources)

    def second(*_: object) -> None:
        with pytest.raises(UserError, match="another prepare is writing"):
            prepare(config, tokenizer_dir)

    prepare(config, tokenizer_dir, second)
