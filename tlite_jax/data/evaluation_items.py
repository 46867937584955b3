"""The n-grams of evaluation items: made once, kept beside the shards, mapped by whoever looks for them."""

import json
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tlite_jax.config import DecontaminationConfig, EvaluationSetConfig, SourceConfig, digest
from tlite_jax.data.documents import BadDocument, Piece, read_piece
from tlite_jax.data.files import ChecksummedFile, map_array, read_json, write_json
from tlite_jax.data.inputs import InputFile, find_files
from tlite_jax.data.words import hash_words, ngrams, normalised
from tlite_jax.errors import UserError

_VERSION = 1
_MAX_CHARACTERS = 10_000_000
# A table of bits tells most n-grams that are in no item.
_FILTER_BITS = 24


@dataclass(frozen=True)
class EvaluationItems:
    """What to look for.

    Attributes:
      directory: where the n-grams lie, once `build` has been called.
      config: `data.prepare.decontaminate`.
      files: set -> its files.
    """

    directory: Path
    config: DecontaminationConfig
    files: dict[str, list[InputFile]]

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("directory", "config", "files")}

    def origin(self) -> dict[str, Any]:
        """Everything that what is found depends on."""
        files = {name: [file.identity() for file in found] for name, found in self.files.items()}
        values = self.config.model_dump(mode="json")
        for found in values["sets"]:
            del found["paths"]
        return {**values, "files": files, "version": _VERSION}

    @cached_property
    def fingerprint(self) -> str:
        """Names what is looked for."""
        return digest(self.origin())

    def build(self) -> None:
        """Writes the n-grams of all items, unless they are there.

        Raises:
          UserError: an item that cannot be read, no items.
        """
        if (self._path / "manifest.json").exists():
            return
        partial = self.directory / f".items-{secrets.token_hex(8)}.partial"
        partial.mkdir(parents=True)
        places, texts, owners = self._read()
        keys, items, short = _keys(texts, owners, len(places), self.config)
        files = {name: ChecksummedFile(partial / f"{name}.bin") for name in ("keys", "items")}
        files["keys"].write(keys.astype("<u8").tobytes())
        files["items"].write(items.astype("<u4").tobytes())
        (partial / "places.json").write_text(json.dumps(places, ensure_ascii=False), encoding="utf-8")
        counts = {name: {"items": 0, "too_short": 0} for name in self.files}
        for (name, _), is_short in zip(places, short.tolist(), strict=True):
            counts[name]["items"] += 1
            counts[name]["too_short"] += is_short
        entries = {f"{name}.bin": file.close() for name, file in files.items()}
        write_json(partial / "manifest.json", {"files": entries, "counts": counts})
        try:
            partial.rename(self._path)
        except OSError:  # another process was sooner
            shutil.rmtree(partial)

    @cached_property
    def keys(self) -> npt.NDArray[np.uint64]:
        """Hashes of all n-grams, ascending."""
        return self._map("keys.bin", np.dtype("<u8"))

    @cached_property
    def items(self) -> npt.NDArray[np.uint32]:
        """Of each n-gram the first item that has it."""
        return self._map("items.bin", np.dtype("<u4"))

    @cached_property
    def places(self) -> list[tuple[str, str]]:
        """Of each item its set, and its file and line."""
        found = json.loads((self._path / "places.json").read_text(encoding="utf-8"))
        return [(name, place) for name, place in found]

    @cached_property
    def counts(self) -> dict[str, dict[str, int]]:
        """Of each set its items, and how many are too short to be looked for."""
        return read_json(self._path / "manifest.json")["counts"]

    @cached_property
    def _filter(self) -> npt.NDArray[np.bool_]:
        table = np.zeros(1 << _FILTER_BITS, bool)
        table[self.keys >> np.uint64(64 - _FILTER_BITS)] = True
        return table

    def find(self, hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Returns which of some n-grams are in an item, and in which."""
        likely = np.flatnonzero(self._filter[hashes >> np.uint64(64 - _FILTER_BITS)])
        if not likely.size:
            return likely, np.empty(0, np.uint32)
        place = np.minimum(np.searchsorted(self.keys, hashes[likely]), len(self.keys) - 1)
        is_there = self.keys[place] == hashes[likely]
        return likely[is_there], self.items[place[is_there]]

    @property
    def _path(self) -> Path:
        return self.directory / f"items-{self.fingerprint}"

    def _map(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        entry = read_json(self._path / "manifest.json")["files"][name]
        return map_array(self._path / name, dtype, entry, verify=True)

    def _read(self) -> tuple[list[tuple[str, str]], list[str], list[int]]:
        """Returns the items' places, all of their texts, and the item that each text is of."""
        places, texts, owners = list[tuple[str, str]](), list[str](), list[int]()
        for found in self.config.sets:
            number: dict[str, int] = {}
            for name in found.text_fields:
                for place, text in _texts(found, name, self.files[found.name]):
                    if place not in number:
                        number[place] = len(places)
                        places.append((found.name, place))
                    texts.append(normalised(text))
                    owners.append(number[place])
        if not texts:
            raise UserError("data.prepare.decontaminate: no items: the files are empty")
        return places, texts, owners


def find_items(config: DecontaminationConfig, directory: Path) -> EvaluationItems:
    """Finds the files of evaluation sets.

    Raises:
      UserError: files that are not there.
    """
    files = {found.name: find_files(_as_source(found, found.text_fields[0])) for found in config.sets}
    return EvaluationItems(directory, config, files)


def _as_source(found: EvaluationSetConfig, text_field: str) -> SourceConfig:
    safe = "".join(character if character.isalnum() else "-" for character in found.name)
    ascii_name = safe.encode("ascii", "replace").decode().replace("?", "x").lstrip("-") or "items"
    return SourceConfig(name=ascii_name, paths=found.paths, format=found.format, text_field=text_field)


def _texts(found: EvaluationSetConfig, text_field: str, files: Sequence[InputFile]) -> list[tuple[str, str]]:
    """The place and one field's text of every item."""
    source, result = _as_source(found, text_field), []
    for file in files:
        for document in read_piece(source, Piece(file), _MAX_CHARACTERS):
            place = f"{file.path}:{document.line}"
            if isinstance(document, BadDocument):
                if document.reason != "empty text":
                    raise UserError(f"evaluation set {found.name}: {place}: {document.reason}; mend it")
            else:
                result.append((place, document.text))
    return result


def _keys(
    texts: Sequence[str], owners: Sequence[int], num_items: int, config: DecontaminationConfig
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
    """Returns distinct keys ascending, the first item of each, and which items have none."""
    words = hash_words(texts)
    lengths = np.bincount(words.texts, minlength=len(texts))
    owner = np.array(owners)
    all_keys, all_items = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for n, keys, first in ngrams(words, config.ngram_words):
        text = words.texts[first]
        # The n-grams of long texts, and short texts whole.
        wanted = (lengths[text] >= n) if n == config.ngram_words else (lengths[text] == n) & (n >= config.min_words)
        all_keys.append(keys[wanted])
        all_items.append(owner[text[wanted]])
    keys, items = np.concatenate(all_keys), np.concatenate(all_items)
    order = np.lexsort((items, keys))
    keys, items = keys[order], items[order]
    is_first = np.ones(len(keys), bool)
    is_first[1:] = keys[1:] != keys[:-1]
    short = np.ones(num_items, bool)
    short[items] = False
    return keys[is_first], items[is_first].astype(np.uint32), short
