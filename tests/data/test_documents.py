"""Every format gives the same documents; bad ones come out with a reason; memory stays bounded."""

import gzip
import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from written_texts import ENGLISH, RUSSIAN, make_texts, write_jsonl

from tlite_jax.config import SourceConfig
from tlite_jax.data.documents import BadDocument, Document, Piece, make_shards, read_piece
from tlite_jax.data.inputs import find_files
from tlite_jax.errors import UserError

TEXTS = make_texts(RUSSIAN, 40, 0) + make_texts(ENGLISH, 40, 1)


def read(source: SourceConfig, limit: int = 100_000, shard_bytes: int = 1 << 25) -> list[Document | BadDocument]:
    shards = make_shards(source, find_files(source), shard_bytes)
    return [found for shard in shards for piece in shard.pieces for found in read_piece(source, piece, limit)]


def source_of(path: Path | str, **fields) -> SourceConfig:
    return SourceConfig(name="s", paths=(str(path),), **fields)


def write_as(kind: str, directory: Path) -> Path:
    records = [{"text": text, "style": f"style{i % 3}"} for i, text in enumerate(TEXTS)]
    plain = write_jsonl(directory / "a.jsonl", records)
    path = directory / f"a.{kind}"
    if kind == "jsonl.zst":
        # Several frames one after another, as pzstd and appending write them.
        half = plain.read_bytes()
        path.write_bytes(zstandard.compress(half[:5000]) + zstandard.compress(half[5000:]))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path, row_group_size=30)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "jsonl.gz", "parquet"])
def test_formats_agree(kind: str, tmp_path: Path) -> None:
    source = source_of(write_as(kind, tmp_path), labels={"language": "ru"}, label_fields={"style": "style"})
    found = read(source)
    assert [document.text for document in found] == TEXTS
    assert [document.line for document in found] == list(range(1, 81))
    assert found[4].labels == {"source": "s", "language": "ru", "style": "style1"}


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS[:5]):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8-sig" if number == 2 else "utf-8")
    (tmp_path / "5.txt").write_bytes("не та кодировка".encode("cp1251"))
    found = read(source_of(tmp_path / "*.txt"))
    assert [document.text for document in found[:5]] == TEXTS[:5]
    assert found[5] == BadDocument("invalid UTF-8", 1)


BAD_LINES = [
    (b'{"text": "half', "malformed JSON"),
    (b"not json at all", "malformed JSON"),
    (b"[" * 100_000, "malformed JSON"),
    (b'{"n": ' + b"9" * 5000 + b', "text": "x"}', "malformed JSON"),
    (b'{"text": "\xff\xfe\xd0"}', "invalid UTF-8"),
    (b"", "empty line"),
    (b"   \t", "empty line"),
    (b'{"text": ""}', "empty text"),
    (b'{"text": " \\n "}', "empty text"),
    (b'{"body": "x"}', "no field 'text'"),
    (b'{"text": null}', "no field 'text'"),
    (b'{"text": 17}', "field 'text' is int, not a string"),
    (b'{"text": ["a"]}', "field 'text' is list, not a string"),
    (b'["text"]', "not a JSON object"),
    (b'{"text": "a\\u0000b"}', "NUL character"),
    (b"\0\0\0", "malformed JSON"),
    (b'{"text": "\\ud83d alone"}', "lone surrogate"),
    (b'{"text": "' + b"a" * 1001 + b'"}', "longer than 1000 characters"),
    (b'{"text": "' + b"a" * 2_000_000 + b'"}', "longer than 1000 characters"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_costs_itself_only(line: bytes, reason: str, tmp_path: Path) -> None:
    good = [json.dumps({"text": text}).encode() for text in ("до", "после")]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good[0] + b"\r\n" + line + b"\n" + good[1])
    before, bad, after = read(source_of(path), limit=1000)
    assert (before.text, after.text) == ("до", "после")
    assert bad == BadDocument(reason, 2)
    assert after.line == 3


def test_a_label_field_that_is_missing_is_said(tmp_path: Path) -> None:
    records = [{"text": "a", "style": "x"}, {"text": "b"}, {"text": "c", "style": {"k": 1}}, {"text": "d", "style": 7}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    found = read(source_of(path, label_fields={"style": "style"}))
    assert [type(document) for document in found] == [Document, BadDocument, BadDocument, Document]
    assert found[1].reason == "field 'style' for label 'style' is missing"
    assert found[3].labels["style"] == "7"


def test_a_huge_line_is_never_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(60):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "small"}\n')
    for stored in (path, tmp_path / "a.jsonl.zst"):
        if stored is not path:
            stored.write_bytes(zstandard.compress(path.read_bytes()))
        tracemalloc.start()
        found = read(source_of(stored), limit=1000)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert [type(document) for document in found] == [BadDocument, Document]
        assert peak < 12_000_000


@given(
    lines=st.lists(st.sampled_from([0, 1, 3, 10, 40]), min_size=1, max_size=60),
    shard_bytes=st.integers(1, 300),
    ends=st.booleans(),
)
def test_shards_of_a_file_hold_each_line_once(lines: list[int], shard_bytes: int, ends: bool, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("shards") / "a.jsonl"
    texts = [f"{number}" + "я" * length for number, length in enumerate(lines)]
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n" * ends)
    source = source_of(path)
    (file,) = find_files(source)
    cuts = [*range(0, file.bytes, shard_bytes), file.bytes]
    pieces = [Piece(file, start, stop) for start, stop in itertools.pairwise(cuts)]
    parts = [list(read_piece(source, piece, 1000)) for piece in pieces]
    assert [document.text for part in parts for document in part] == texts
    for part in parts:
        assert [document.line for document in part] == list(range(1, len(part) + 1))


def test_parquet_is_cut_between_row_groups_and_each_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"text": text} for text in TEXTS]), path, row_group_size=7)
    source = source_of(path)
    (file,) = find_files(source)
    for size in (100, 1000, 2500, file.bytes):
        cuts = [*range(0, file.bytes, size), file.bytes]
        parts = [list(read_piece(source, Piece(file, *cut), 10_000)) for cut in itertools.pairwise(cuts)]
        assert [document.text for part in parts for document in part] == TEXTS
        assert all([document.line for document in part] == list(range(1, len(part) + 1)) for part in parts)
    assert len(make_shards(source, [file], 2500)) > 2
    # A broken footer is said once, not by every piece.
    path.write_bytes(path.read_bytes()[:-3])
    (damage,) = read(source, shard_bytes=1000)
    assert damage.reason == "damaged parquet file"


def test_a_cut_at_any_byte_loses_no_line(tmp_path: Path) -> None:
    texts = ["а", "", "ббб", "в" * 20, "г"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    source = source_of(path)
    (file,) = find_files(source)
    for cut in range(1, file.bytes):
        parts = [list(read_piece(source, piece, 1000)) for piece in (Piece(file, 0, cut), Piece(file, cut, file.bytes))]
        assert [getattr(document, "text", "") for part in parts for document in part] == texts


def test_small_files_share_a_shard_and_large_ones_are_cut(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("a" * 900)
    small = source_of(tmp_path / "*.txt")
    assert [len(shard.pieces) for shard in make_shards(small, find_files(small), 4000)] == [4, 4, 2]
    large = source_of(write_as("jsonl", tmp_path))
    shards = make_shards(large, find_files(large), 4000)
    assert len(shards) > 5
    assert [document.text for document in read(large, shard_bytes=4000)] == TEXTS


@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_damaged_compression_costs_only_what_lies_behind_it(suffix: str, tmp_path: Path) -> None:
    path = write_as(f"jsonl.{suffix}", tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], whole[:-6] + b"\xff" + whole[-5:]):
        path.write_bytes(damaged)
        found = read(source_of(path))
        *good, bad = found
        assert [document.text for document in good] == TEXTS[: len(good)]
        assert isinstance(bad, BadDocument)
        assert bad.reason == f"damaged {'zstd' if suffix == 'zst' else 'gzip'} file"
        assert bad.line == len(good) + 1
        # zstd is decoded by blocks, of which this file has few; the flipped byte is in the checksum of all of it.
        least = {len(whole) - 20: 70, len(whole) // 2: 15}.get(len(damaged), 0)
        assert len(good) >= (least if suffix == "gz" else 4)


def test_a_damaged_row_group_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([{"text": text} for text in TEXTS])
    pyarrow.parquet.write_table(table, path, row_group_size=30, use_dictionary=False, write_page_checksum=True)
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[group.data_page_offset + group.total_compressed_size // 2] ^= 0x40
    path.write_bytes(data)
    found = read(source_of(path))
    bad = [document for document in found if isinstance(document, BadDocument)]
    assert [(document.reason, document.line, document.documents) for document in bad] == [
        ("damaged parquet row group", 31, 30)
    ]
    assert [document.text for document in found if isinstance(document, Document)] == TEXTS[:30] + TEXTS[60:]
    assert found[-1].line == 80
    path.write_bytes(bytes(data[:-10]))
    (bad_file,) = read(source_of(path))
    assert (bad_file.reason, bad_file.lost_bytes) == ("damaged parquet file", len(data) - 10)


def test_a_bad_line_says_where_it_begins(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in TEXTS[:9]]
    lines[4] = b"{broken"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    for stored in (path, tmp_path / "a.jsonl.gz"):
        if stored is not path:
            stored.write_bytes(gzip.compress(path.read_bytes()))
        bad = read(source_of(stored))[4]
        assert path.read_bytes()[bad.offset :].startswith(b"{broken\n")


def test_random_bytes_are_quarantined_and_never_end_the_reading(tmp_path: Path) -> None:
    """Seeded noise over good input: every reading ends, and whatever is called good is UTF-8 text."""
    random = np.random.default_rng(0)
    for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet"):
        path = write_as(kind, tmp_path)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(25):
            noisy = whole.copy()
            places = random.integers(0, len(noisy), random.integers(1, 6))
            noisy[places] = random.integers(0, 256, len(places))
            path.write_bytes(noisy[: random.integers(1, len(noisy) + 1)].tobytes())
            for document in read(source_of(path)):
                if isinstance(document, Document):
                    document.text.encode()
                else:
                    assert document.documents >= 1


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    write_as("parquet", tmp_path)
    (tmp_path / "a.bin").write_bytes(b"x")
    cases = [
        (source_of(tmp_path / "none.jsonl"), "cannot read .*none.jsonl: No such file"),
        (source_of(tmp_path / "*.none"), r"no file matches .*\*\.none"),
        (source_of(tmp_path), "is a directory; give a pattern"),
        (source_of(tmp_path / "a.bin"), "cannot tell the format"),
        (source_of(tmp_path / "a.parquet", text_field="body"), "no column 'body'; it has text, style"),
    ]
    for source, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            read(source)
        assert "\n" not in str(caught.value)


def test_a_file_matched_twice_is_read_once(tmp_path: Path) -> None:
    path = write_as("jsonl", tmp_path)
    source = SourceConfig(name="s", paths=(str(path), str(tmp_path / "*.jsonl")))
    assert len(find_files(source)) == 1
