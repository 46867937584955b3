"""Files of documents -> labelled documents, one at a time in bounded memory; bad ones come out as what is wrong.

Input is cut into shards that do not depend on the number of workers: byte ranges of plain jsonl, whole files of
everything else, small ones together.
"""

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from tlite_jax.config import SourceConfig
from tlite_jax.data.compressed import DamagedError, decompressed
from tlite_jax.data.conversation import Message, fields_of, plain_text, read_messages, scored_bytes
from tlite_jax.data.inputs import InputFile, open_input
from tlite_jax.errors import UserError

# A character takes at most 12 bytes in JSON (a pair of \uXXXX escapes); other fields get this much room.
_BYTES_PER_CHARACTER, _OTHER_FIELDS_BYTES = 12, 1 << 20
_READ_BYTES = 1 << 20
_PARQUET_BATCH = 64


@dataclass(frozen=True)
class Document:
    """A document that can be used.

    Attributes:
      text: of a conversation, its messages' contents.
      labels: label -> value.
      line: counts from 1 in what was read (rows for parquet).
      id: its own, where the source has an id_field.
      messages: of a conversation.
    """

    text: str
    labels: dict[str, str]
    line: int
    id: str | None = None
    messages: list[Message] | None = None

    @property
    def scored_bytes(self) -> int:
        """UTF-8 bytes of what is scored: all, or a conversation's answers."""
        return len(self.text.encode()) if self.messages is None else scored_bytes(self.messages)


@dataclass(frozen=True)
class BadDocument:
    """One that cannot, and why.

    Attributes:
      reason: one of few, to be counted.
      line: counts from 1 in what was read.
      offset: where it begins in what was read, in bytes, after decompression; None for parquet.
      detail: what a library said.
      lost_bytes: of a damaged file, the bytes of it that could not be read.
      documents: how many are lost; for a damaged file as many as are known of, and at least 1.
    """

    reason: str
    line: int
    offset: int | None = field(default=None, compare=False)
    detail: str | None = field(default=None, compare=False)
    lost_bytes: int = field(default=0, compare=False)
    documents: int = field(default=1, compare=False)


@dataclass(frozen=True)
class Piece:
    """The lines, or parquet row groups, of a file that begin in bytes start..stop-1; stop None is its end."""

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


def make_shards(source: SourceConfig, files: Sequence[InputFile], shard_bytes: int) -> list[Shard]:
    """Cuts and groups files into shards of about `shard_bytes`."""
    pieces: list[Piece] = []
    for file in files:
        can_be_cut = file.format != "text" and file.compression is None and file.ranges
        if can_be_cut and file.bytes > shard_bytes:
            cuts = [*range(0, file.bytes, shard_bytes), file.bytes]
            pieces += [Piece(file, start, stop) for start, stop in itertools.pairwise(cuts)]
        else:
            pieces.append(Piece(file))
    shards, group, size = [], list[Piece](), 0
    for piece in pieces:
        if group and size + piece.bytes > shard_bytes:
            shards.append(Shard(source, tuple(group)))
            group, size = [], 0
        group.append(piece)
        size += piece.bytes
    return [*shards, Shard(source, tuple(group))] if group else shards


def read_piece(source: SourceConfig, piece: Piece, max_characters: int) -> Iterator[Document | BadDocument]:
    """Reads the documents of a piece in order; `line` counts from the piece's first line.

    What is damaged (compression, parquet) comes out as a BadDocument after all that lies before the damage.

    Raises:
      UserError: the file cannot be read at all, has changed since it was found, or lacks a column.
    """
    line = 0
    try:
        if piece.file.format == "parquet":
            found = _read_parquet(source, piece, max_characters)
        elif piece.file.format == "text":
            found = _read_text(source, piece.file, max_characters)
        else:
            found = _read_jsonl(source, piece, max_characters)
        for document in found:
            line = document.line
            yield document
    except DamagedError as error:
        yield _damage(error, line + 1)
    except OSError as error:
        reason = str(error.strerror or error).splitlines()[0]
        raise UserError(f"cannot read {piece.file.path} after line {line}: {reason}; start again") from error


def _damage(error: DamagedError, line: int) -> BadDocument:
    return BadDocument(
        error.reason, line, detail=error.detail, lost_bytes=max(error.lost_bytes, 0), documents=error.documents
    )


def _open(file: InputFile) -> BinaryIO:
    stream = open_input(file)
    if file.compression is None:
        # Remote files have a readline without a limit.
        return stream if file.version == "" else cast(BinaryIO, io.BufferedReader(cast(Any, stream), _READ_BYTES))
    return cast(BinaryIO, decompressed(stream, file.compression, file.bytes))


def _read_jsonl(source: SourceConfig, piece: Piece, max_characters: int) -> Iterator[Document | BadDocument]:
    limit = max_characters * _BYTES_PER_CHARACTER + _OTHER_FIELDS_BYTES
    with _open(piece.file) as stream:
        for line, (offset, data) in enumerate(_lines(stream, piece.start, piece.stop, limit), 1):
            if offset == 0:
                data = data and data.removeprefix(b"\xef\xbb\xbf")
            result = _too_long(max_characters) if data is None else _parse(data)
            yield _accept(source, result, line, offset, max_characters)


def _lines(stream: BinaryIO, start: int, stop: int | None, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields offset and bytes of the lines that begin in start..stop-1.

    None stands for a line longer than `limit` bytes, which is never held.
    """
    position = start
    if start:
        stream.seek(start - 1)
        position += _skip_line(stream) - 1
    while stop is None or position < stop:
        data = stream.readline(limit)
        if not data:
            return
        offset = position
        position += len(data)
        if len(data) == limit and not data.endswith(b"\n"):
            position += _skip_line(stream)
            yield offset, None
        else:
            yield offset, data


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
    yield _accept(source, result, 1, 0, max_characters)


def _read_parquet(source: SourceConfig, piece: Piece, max_characters: int) -> Iterator[Document | BadDocument]:
    file = piece.file
    try:
        stream = open_input(file)
        parquet = pa.parquet.ParquetFile(stream, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        damage = _as_damage(error, "damaged parquet file", file.bytes, 1)
        if piece.start == 0:  # said once for all pieces of the file
            raise damage from error
        return
    with stream, parquet:
        columns = _columns(source)
        if missing := [name for name in columns if name not in parquet.schema_arrow.names]:
            there = ", ".join(parquet.schema_arrow.names)
            raise UserError(f"source {source.name}: {file.path} has no column {missing[0]!r}; it has {there}")
        first = 0
        for group in _groups_of(parquet.metadata, piece):
            line, rows = first, parquet.metadata.row_group(group).num_rows
            try:
                for line, values in enumerate(_rows(parquet, group, columns, source, max_characters), first + 1):
                    yield _accept(source, values, line, None, max_characters)
            except (pa.ArrowException, OSError) as error:
                lost = first + rows - line
                lost_bytes = file.bytes * lost // max(parquet.metadata.num_rows, 1)
                yield _damage(_as_damage(error, "damaged parquet row group", lost_bytes, max(lost, 1)), line + 1)
            first += rows


def _groups_of(metadata: pa.parquet.FileMetaData, piece: Piece) -> list[int]:
    """The row groups whose first column begins in a piece."""
    stop = piece.file.bytes if piece.stop is None else piece.stop
    groups = []
    for group in range(metadata.num_row_groups):
        column = metadata.row_group(group).column(0)
        begins = column.dictionary_page_offset or column.data_page_offset
        # Wherever a broken footer says that one begins, one piece has it.
        if piece.start <= min(max(begins, 0), piece.file.bytes - 1) < stop:
            groups.append(group)
    return groups


def _columns(source: SourceConfig) -> list[str]:
    """The columns that are read, each once, the longest first."""
    content = [source.text_field] if source.chat is None else fields_of(source.chat)
    key = [] if source.id_field is None else [source.id_field]
    return list(dict.fromkeys([*content, *source.label_fields.values(), *key]))


def _rows(
    parquet: pa.parquet.ParquetFile, group: int, columns: list[str], source: SourceConfig, max_characters: int
) -> Iterator[dict[str, Any] | str]:
    """Yields the records of a row group, or what is wrong with one."""
    for batch in parquet.iter_batches(_PARQUET_BATCH, row_groups=[group], columns=columns, use_threads=False):
        texts = batch.column(columns[0])
        is_text = pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)
        sizes = pa.compute.binary_length(texts).to_pylist() if is_text else [None] * batch.num_rows
        for row, size in enumerate(sizes):
            if size is not None and size > 4 * max_characters:
                yield _too_long(max_characters)
                continue
            try:
                yield {name: batch.column(name)[row].as_py() for name in columns}
            except UnicodeDecodeError:
                yield "invalid UTF-8"


def _as_damage(error: Exception, reason: str, lost_bytes: int, documents: int) -> DamagedError:
    """Arrow's complaint about the bytes; a file that cannot be reached is no damage and is raised as it came."""
    if isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None):
        return DamagedError(reason, str(error).splitlines()[0], lost_bytes, documents)
    raise error


def _accept(
    source: SourceConfig, values: dict[str, Any] | str, line: int, offset: int | None, max_characters: int
) -> Document | BadDocument:
    """Checks a record; a str is a problem found already."""
    if isinstance(values, str):
        return BadDocument(values, line, offset)
    messages = None if source.chat is None else read_messages(source.chat, values)
    if isinstance(messages, str):
        return BadDocument(messages, line, offset)
    text = values.get(source.text_field) if messages is None else plain_text(messages)
    if problem := _problem(text, source.text_field, max_characters):
        return BadDocument(problem, line, offset)
    labels = {"source": source.name, **source.labels}
    for label, name in source.label_fields.items():
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            missing = "is missing" if value is None else "is not a label"
            return BadDocument(f"field {name!r} for label {label!r} {missing}", line, offset)
        labels[label] = str(value).strip()
    key = None if source.id_field is None else values.get(source.id_field)
    return Document(cast(str, text), labels, line, None if key is None else str(key), messages)


def _problem(text: Any, field: str, max_characters: int) -> str | None:
    if text is None:
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
