"""Files of documents -> labelled documents, one at a time in bounded memory; bad ones come out as what is wrong.

Input is cut into shards that do not depend on the number of workers: byte ranges of plain jsonl, whole files of
everything else, small ones together.
"""

import glob
import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.parquet

from tlite_jax.config import SourceConfig
from tlite_jax.errors import UserError

SHARD_BYTES = 32 << 20
# A character takes at most 12 bytes in JSON (a pair of \uXXXX escapes); other fields get this much room.
_BYTES_PER_CHARACTER, _OTHER_FIELDS_BYTES = 12, 1 << 20
_READ_BYTES = 1 << 20
_PARQUET_BATCH = 64
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text"}
_COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}


@dataclass(frozen=True)
class Document:
    """A document that can be used; `line` counts from 1 in what was read (rows for parquet)."""

    text: str
    labels: dict[str, str]
    line: int


@dataclass(frozen=True)
class BadDocument:
    """One that cannot, and why."""

    reason: str
    line: int


@dataclass(frozen=True)
class InputFile:
    """A file as it was found: whatever of this changes makes it another input."""

    path: str
    format: Literal["jsonl", "parquet", "text"]
    compression: str | None
    bytes: int
    modified_ns: int

    def identity(self) -> dict[str, Any]:
        """What the prepare hash knows of the file; its directory may change."""
        return {"name": os.path.basename(self.path), "bytes": self.bytes, "modified_ns": self.modified_ns}


@dataclass(frozen=True)
class Piece:
    """The lines of a file that begin in bytes start..stop-1; stop None is its end."""

    file: InputFile
    start: int = 0
    stop: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return (self.file.bytes if self.stop is None else self.stop) - self.start


@dataclass(frozen=True)
class Shard:
    """What one task reads."""

    source: SourceConfig
    pieces: tuple[Piece, ...]


def find_files(source: SourceConfig) -> list[InputFile]:
    """Resolves a source's paths and glob patterns, each file once, patterns sorted.

    Raises:
      UserError: nothing matches, a directory, an unreadable file, a format that cannot be told.
    """
    found: dict[str, InputFile] = {}
    for pattern in source.paths:
        expanded = os.path.expanduser(pattern)
        is_pattern = glob.has_magic(expanded) and not os.path.exists(expanded)
        paths = sorted(glob.glob(expanded, recursive=True)) if is_pattern else [expanded]
        files = [path for path in paths if not os.path.isdir(path)] if is_pattern else paths
        if not files:
            raise UserError(f"source {source.name}: no file matches {pattern}")
        for path in files:
            found.setdefault(path, _input_file(source, path))
    return list(found.values())


def make_shards(source: SourceConfig, files: Sequence[InputFile]) -> list[Shard]:
    """Cuts and groups files into shards of about SHARD_BYTES."""
    pieces: list[Piece] = []
    for file in files:
        if file.format == "jsonl" and file.compression is None and file.bytes > SHARD_BYTES:
            cuts = [*range(0, file.bytes, SHARD_BYTES), file.bytes]
            pieces += [Piece(file, start, stop) for start, stop in itertools.pairwise(cuts)]
        else:
            pieces.append(Piece(file))
    shards, group, size = [], list[Piece](), 0
    for piece in pieces:
        if group and size + piece.bytes > SHARD_BYTES:
            shards.append(Shard(source, tuple(group)))
            group, size = [], 0
        group.append(piece)
        size += piece.bytes
    return [*shards, Shard(source, tuple(group))] if group else shards


def read_piece(source: SourceConfig, piece: Piece, max_characters: int) -> Iterator[Document | BadDocument]:
    """Reads the documents of a piece in order; `line` counts from the piece's first line.

    Raises:
      UserError: the file cannot be read at all, or its compression is damaged or ends early.
    """
    path = piece.file.path
    line = 0
    try:
        if piece.file.format == "parquet":
            found = _read_parquet(source, path, max_characters)
        elif piece.file.format == "text":
            found = _read_text(source, piece.file, max_characters)
        else:
            found = _read_jsonl(source, piece, max_characters)
        for document in found:
            line = document.line
            yield document
    except (OSError, EOFError, pa.ArrowException) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise UserError(f"cannot read {path} after line {line}: {reason}; mend or remove the file") from error


def _input_file(source: SourceConfig, path: str) -> InputFile:
    if os.path.isdir(path):
        raise UserError(
            f"source {source.name}: {path} is a directory; give a pattern such as {path.rstrip('/')}/*.jsonl"
        )
    try:
        status = os.stat(path)
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"source {source.name}: cannot read {path}: {error.strerror}") from error
    name = Path(path)
    compression = _COMPRESSIONS.get(name.suffix)
    suffix = Path(name.stem).suffix if compression else name.suffix
    form = _FORMATS.get(suffix) if source.format == "auto" else source.format
    if form is None:
        raise UserError(f"source {source.name}: cannot tell the format of {path} by its suffix; set its format")
    if form == "parquet" and compression:
        raise UserError(f"source {source.name}: {path}: a compressed parquet file; decompress it")
    known = cast(Literal["jsonl", "parquet", "text"], form)
    return InputFile(path, known, compression, status.st_size, status.st_mtime_ns)


def _open(file: InputFile) -> BinaryIO:
    if file.compression is None:
        return open(file.path, "rb")
    # Unlike the gzip and zstandard modules' readers, Arrow's refuses a stream that ends early, in either format.
    stream = pa.CompressedInputStream(pa.OSFile(file.path), file.compression)
    return cast(BinaryIO, io.BufferedReader(cast(Any, stream), _READ_BYTES))


def _read_jsonl(source: SourceConfig, piece: Piece, max_characters: int) -> Iterator[Document | BadDocument]:
    limit = max_characters * _BYTES_PER_CHARACTER + _OTHER_FIELDS_BYTES
    with _open(piece.file) as stream:
        for line, data in enumerate(_lines(stream, piece.start, piece.stop, limit), 1):
            if line == 1 and piece.start == 0:
                data = data and data.removeprefix(b"\xef\xbb\xbf")
            result = _too_long(max_characters) if data is None else _parse(data)
            yield _accept(source, result, line, max_characters)


def _lines(stream: BinaryIO, start: int, stop: int | None, limit: int) -> Iterator[bytes | None]:
    """Yields the lines that begin in start..stop-1, None for one longer than `limit` bytes, which is never held."""
    position = start
    if start:
        stream.seek(start - 1)
        position += _skip_line(stream) - 1
    while stop is None or position < stop:
        data = stream.readline(limit)
        if not data:
            return
        position += len(data)
        if len(data) == limit and not data.endswith(b"\n"):
            position += _skip_line(stream)
            yield None
        else:
            yield data


def _skip_line(stream: BinaryIO) -> int:
    """Reads to the end of the line; returns how many bytes that were."""
    skipped = 0
    while data := stream.readline(_READ_BYTES):
        skipped += len(data)
        if data.endswith(b"\n"):
            break
    return skipped


def _parse(data: bytes) -> dict[str, Any] | str:
    """A JSON object, or what is wrong."""
    if not data.strip():
        return "empty line"
    try:
        values = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        return "invalid UTF-8"
    except (ValueError, RecursionError):
        return "malformed JSON"
    return values if isinstance(values, dict) else "not a JSON object"


def _read_text(source: SourceConfig, file: InputFile, max_characters: int) -> Iterator[Document | BadDocument]:
    limit = max_characters * 4
    with _open(file) as stream:
        data = stream.read(limit + 1)
    result: dict[str, Any] | str
    try:
        text = data.decode("utf-8-sig") if len(data) <= limit else None
        result = _too_long(max_characters) if text is None else {source.text_field: text}
    except UnicodeDecodeError:
        result = "invalid UTF-8"
    yield _accept(source, result, 1, max_characters)


def _read_parquet(source: SourceConfig, path: str, max_characters: int) -> Iterator[Document | BadDocument]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = list(dict.fromkeys([source.text_field, *source.label_fields.values()]))
        if missing := [name for name in columns if name not in file.schema_arrow.names]:
            there = ", ".join(file.schema_arrow.names)
            raise UserError(f"source {source.name}: {path} has no column {missing[0]!r}; it has {there}")
        line = 0
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=columns, use_threads=False):
            for row in range(batch.num_rows):
                line += 1
                result: dict[str, Any] | str
                try:
                    result = {name: batch.column(name)[row].as_py() for name in columns}
                except UnicodeDecodeError:
                    result = "invalid UTF-8"
                yield _accept(source, result, line, max_characters)


def _accept(
    source: SourceConfig, values: dict[str, Any] | str, line: int, max_characters: int
) -> Document | BadDocument:
    """Checks a record; a str is a problem found already."""
    if isinstance(values, str):
        return BadDocument(values, line)
    text = values.get(source.text_field)
    if problem := _problem(text, source.text_field, values, max_characters):
        return BadDocument(problem, line)
    labels = {"source": source.name, **source.labels}
    for label, field in source.label_fields.items():
        value = values.get(field)
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            missing = "is missing" if value is None else "is not a label"
            return BadDocument(f"field {field!r} for label {label!r} {missing}", line)
        labels[label] = str(value).strip()
    return Document(cast(str, text), labels, line)


def _problem(text: Any, field: str, values: dict[str, Any], max_characters: int) -> str | None:
    if field not in values or text is None:
        return f"no field {field!r}"
    if not isinstance(text, str):
        return f"field {field!r} is {type(text).__name__}, not a string"
    if not text.strip():
        return "empty text"
    if len(text) > max_characters:
        return _too_long(max_characters)
    if "\0" in text:
        return "NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "lone surrogate"
    return None


def _too_long(max_characters: int) -> str:
    return f"longer than {max_characters} characters"
