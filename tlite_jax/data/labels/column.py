"""Labels that someone else computed: a column of parquet or jsonl files, joined by a document's id or text.

The values are indexed once, in a file that all processes map: 10 bytes a value on disk. Building it takes about 40
bytes of memory a value.
"""

import hashlib
import json
import math
import os
import secrets
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from tlite_jax.config import SourceConfig, digest
from tlite_jax.config.labels import ColumnLabellerConfig
from tlite_jax.data.compressed import DamagedError, decompressed
from tlite_jax.data.documents import Document
from tlite_jax.data.files import file_entry, map_array, read_json, write_json
from tlite_jax.data.inputs import InputFile, find_files, open_input
from tlite_jax.data.labels.labeller import UNKNOWN, text_hash
from tlite_jax.errors import UserError

_MAX_VALUES = 10_000
NO_VALUE, NO_ID = "no value in the label's column", "no id"


class ColumnLabeller:
    """Looks a document's value up."""

    def __init__(self, config: ColumnLabellerConfig, directory: Path) -> None:
        self._config = config
        self.labels: tuple[str, ...] = (config.label,)
        source = SourceConfig(name=f"label-{config.label}", paths=config.paths, text_field=config.column)
        self._files = find_files(source)
        if wrong := [file.path for file in self._files if file.format == "text"]:
            raise UserError(f"labeller column: {wrong[0]} is neither parquet nor jsonl")
        self._directory = directory / self.fingerprint()

    def fingerprint(self) -> str:
        """The files as they were found, and what is read of them."""
        settings = self._config.model_dump(mode="json", exclude={"paths", "missing", "sources", "replace"})
        return digest([settings, [file.identity() for file in self._files]])

    def label(self, documents: Sequence[Document]) -> list[dict[str, str] | str]:
        """The label of each document, unknown, or why it is left out."""
        keys, codes, values = self._index
        wanted = [self._key(document) for document in documents]
        places = np.searchsorted(keys, np.array([key or 0 for key in wanted], np.uint64))
        result: list[dict[str, str] | str] = []
        for key, place in zip(wanted, places.tolist(), strict=True):
            if key is not None and place < len(keys) and int(keys[place]) == key:
                result.append({self._config.label: values[int(codes[place])]})
            elif self._config.missing == "unknown":
                result.append({self._config.label: UNKNOWN})
            else:
                result.append(NO_ID if key is None else NO_VALUE)
        return result

    def _key(self, document: Document) -> int | None:
        if self._config.key == "hash":
            return _key_of(text_hash(document.text))
        return None if document.id is None else _key_of(document.id)

    @cached_property
    def _index(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], list[str]]:
        """Sorted keys, the value's number of each, and the values."""
        if not (self._directory / "manifest.json").exists():
            self._build()
        manifest = read_json(self._directory / "manifest.json")
        files = manifest["files"]
        keys = map_array(self._directory / "keys.bin", np.dtype("<u8"), files["keys.bin"], verify=True)
        codes = map_array(self._directory / "codes.bin", np.dtype("<u2"), files["codes.bin"], verify=True)
        return keys, codes, manifest["values"]

    def _build(self) -> None:
        """Writes the index under a temporary name; whoever is done first gives it its own."""
        numbers: dict[str, int] = {}
        keys, codes = array("Q"), array("H")
        for key, value in self._values():
            keys.append(_key_of(key))
            codes.append(numbers.setdefault(value, len(numbers)))
            if len(numbers) > _MAX_VALUES:
                raise self._wrong(
                    f"more than {_MAX_VALUES} different values in {self._config.column!r}", "set thresholds"
                )
        key_array, code_array = np.frombuffer(keys, "<u8"), np.frombuffer(codes, "<u2")
        order = np.argsort(key_array, kind="stable")
        key_array, code_array = key_array[order], code_array[order]
        same = key_array[1:] == key_array[:-1]
        if np.any(same & (code_array[1:] != code_array[:-1])):
            raise self._wrong(f"a {self._config.key_column!r} has two different values", "leave one of them")
        partial = self._directory.with_name(f".{self._directory.name}.{secrets.token_hex(4)}")
        partial.mkdir(parents=True)
        key_array.tofile(partial / "keys.bin")
        code_array.tofile(partial / "codes.bin")
        files = {name: file_entry(partial / name) for name in ("keys.bin", "codes.bin")}
        write_json(partial / "manifest.json", {"values": list(numbers), "files": files})
        try:
            os.rename(partial, self._directory)
        except OSError:  # another process was done first, with the same bytes
            if not (self._directory / "manifest.json").exists():
                raise

    def _values(self) -> Iterator[tuple[str, str]]:
        """(key, label's value) of every record that has both."""
        for file in self._files:
            try:
                records = _read_parquet if file.format == "parquet" else _read_jsonl
                for line, record in enumerate(records(file, [self._config.key_column, self._config.column]), 1):
                    key, value = record.get(self._config.key_column), record.get(self._config.column)
                    if key is None or value is None:
                        continue
                    yield str(key), self._value(file, line, value)
            except (DamagedError, pa.ArrowException, ValueError, OSError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"labeller column: cannot read {file.path}: {str(error).splitlines()[0]}") from error

    def _value(self, file: InputFile, line: int, value: Any) -> str:
        if self._config.thresholds is None:
            if isinstance(value, bool | float) or not str(value).strip():
                raise UserError(
                    f"labeller column: {file.path}:{line}: {self._config.column!r} is {value!r}, which is no label; "
                    "numbers need thresholds"
                )
            return str(value).strip()
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"labeller column: {file.path}:{line}: {self._config.column!r} is {value!r}, not a number")
        reached = [(least, name) for name, least in self._config.thresholds.items() if value >= least]
        return max(reached)[1] if reached else UNKNOWN

    def _wrong(self, what: str, mend: str) -> UserError:
        return UserError(f"labeller column {', '.join(self._config.paths)}: {what}; {mend}")


def _key_of(text: str) -> int:
    """A 64-bit hash: at 300 million ids, one chance in 400 that any two share theirs."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _read_parquet(file: InputFile, columns: list[str]) -> Iterator[dict[str, Any]]:
    with open_input(file) as stream, pa.parquet.ParquetFile(stream) as parquet:
        if missing := [name for name in columns if name not in parquet.schema_arrow.names]:
            there = ", ".join(parquet.schema_arrow.names)
            raise UserError(f"labeller column: {file.path} has no column {missing[0]!r}; it has {there}")
        for batch in parquet.iter_batches(columns=columns):
            yield from batch.to_pylist()


def _read_jsonl(file: InputFile, columns: list[str]) -> Iterator[dict[str, Any]]:
    with open_input(file) as stored:
        stream = stored if file.compression is None else decompressed(stored, file.compression, file.bytes)
        for line, data in enumerate(stream, 1):
            record = json.loads(data)
            if not isinstance(record, dict) or any(name not in record for name in columns):
                lacking = next(name for name in columns if not isinstance(record, dict) or name not in record)
                raise UserError(f"labeller column: {file.path}:{line} has no field {lacking!r}")
            yield record
