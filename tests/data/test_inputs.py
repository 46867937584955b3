"""Files behind URLs are read like local ones; what has changed, or cannot be reached, is said."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from written_texts import RUSSIAN, make_texts, write_jsonl

from tlite_jax.config import SourceConfig
from tlite_jax.data.documents import make_shards, read_piece
from tlite_jax.data.inputs import find_files
from tlite_jax.errors import UserError

TEXTS = make_texts(RUSSIAN, 60, 0)


def source_of(*paths: str) -> SourceConfig:
    return SourceConfig(name="s", paths=paths)


def texts(source: SourceConfig) -> list[str]:
    shards = make_shards(source, find_files(source), 3000)
    return [document.text for shard in shards for piece in shard.pieces for document in read_piece(source, piece, 9999)]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """The same documents in every format, in one directory."""
    records = [{"text": text} for text in TEXTS]
    plain = write_jsonl(tmp_path / "a.jsonl", records)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "c.parquet", row_group_size=20)
    return tmp_path


@pytest.fixture
def memory(stored: Path) -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    for path in stored.iterdir():
        filesystem.pipe(f"/corpus/{path.name}", path.read_bytes())
    yield "memory://corpus"
    filesystem.rm("/corpus", recursive=True)


@pytest.fixture
def web(stored: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(stored)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_format_is_read_from_any_file_system(memory: str, stored: Path) -> None:
    for place in (memory, f"file://{stored}"):
        source = source_of(f"{place}/*")
        assert [file.path.rsplit("/")[-1] for file in find_files(source)] == ["a.jsonl", "b.jsonl.zst", "c.parquet"]
        assert len(make_shards(source, find_files(source), 3000)) > 4, "plain jsonl is cut, wherever it lies"
        assert texts(source) == TEXTS * 3


def test_a_web_server_is_read_as_a_stream(web: str) -> None:
    for name in ("a.jsonl", "b.jsonl.zst"):
        assert texts(source_of(f"{web}/{name}")) == TEXTS
    with pytest.raises(UserError, match=r"source s: cannot read http.*none\.jsonl"):
        find_files(source_of(f"{web}/none.jsonl"))


def test_a_file_that_changed_since_it_was_found_is_refused(memory: str, stored: Path) -> None:
    for place in (memory, f"file://{stored}", str(stored)):
        source = source_of(f"{place}/a.jsonl")
        (before,) = find_files(source)
        shards = make_shards(source, [before], 3000)
        with fsspec.open(f"{place}/a.jsonl", "wb") as file:
            file.write(b'{"text": "another"}\n')
        (after,) = find_files(source)
        assert before.identity() != after.identity()
        assert before.identity()["name"] == "a.jsonl"
        with pytest.raises(UserError, match=r"a\.jsonl changed while it was prepared"):
            list(read_piece(source, shards[0].pieces[0], 9999))


def test_what_cannot_be_opened_is_one_line(memory: str) -> None:
    cases = [
        (f"{memory}/none.jsonl", r"source s: cannot read memory://corpus/none\.jsonl"),
        (f"{memory}/*.txt", r"source s: no file matches memory://corpus/\*\.txt"),
        (memory, "source s: memory://corpus is a directory; give a pattern"),
        ("nothing://a/b.jsonl", "source s: cannot read nothing://a/b.jsonl: Protocol not known"),
        ("zip://a.jsonl::memory://corpus/z.zip", "chained URLs are not read"),
    ]
    for path, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            find_files(source_of(path))
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"source s: s3:// needs a package .*pip install 'tlite_jax\[s3\]'"):
        find_files(source_of("s3://bucket/a.jsonl"))
    with pytest.raises(UserError, match="abfs:// needs a package that is not installed: Install s3fs"):
        find_files(source_of("abfs://bucket/a.jsonl"))
