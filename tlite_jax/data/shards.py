"""One shard of input -> one directory of tokenised documents: a pure function, run by any executor.

The directory is named by a hash of everything it depends on, appears whole or not at all, and is found again when an
interrupted `prepare` starts anew.
"""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tlite_jax.config import NearDuplicatesConfig, digest
from tlite_jax.data.deduplicate import Signer
from tlite_jax.data.documents import BadDocument, Document, Shard, read_piece
from tlite_jax.data.files import ChecksummedFile, map_array, read_json, write_json
from tlite_jax.data.tokenize import Encoder, TokenizerFile

SHARD_VERSION = 1
TABLE = np.dtype(
    [("hash", "<u8", 2), ("tokens", "<i8"), ("bytes", "<i8"), ("labels", "<u4"), ("piece", "<u4"), ("line", "<i8")]
)
# Documents are tokenised together up to this many characters.
_BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class ShardSettings:
    """What every shard of a preparation shares."""

    directory: Path
    tokenizer: TokenizerFile
    bucket_labels: tuple[str, ...]
    max_document_characters: int
    near_duplicates: NearDuplicatesConfig | None


@dataclass(frozen=True)
class TokenizedShard:
    """A shard on disk. `lines` counts the lines of each piece, `labels` are indexed by the table."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def labels(self) -> list[dict[str, str]]:
        """The distinct bucket labels of its documents."""
        return self.manifest["labels"]

    def table(self) -> npt.NDArray[Any]:
        """One record per document, in order of reading."""
        return self._map("documents.bin", TABLE)

    def tokens(self, *, verify: bool) -> npt.NDArray[np.uint32]:
        """All documents' tokens, one after another, mapped."""
        return self._map("tokens.bin", np.dtype("<u4"), verify=verify)

    def signatures(self, num_permutations: int) -> npt.NDArray[np.uint32]:
        """MinHash signatures, uint32 [documents, num_permutations]."""
        return self._map("signatures.bin", np.dtype("<u4")).reshape(-1, num_permutations)

    def quarantined(self) -> Iterator[dict[str, Any]]:
        """The bad documents: piece, line, reason."""
        with (self.directory / "quarantine.jsonl").open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def _map(self, name: str, dtype: np.dtype[Any], *, verify: bool = True) -> npt.NDArray[Any]:
        return map_array(self.directory / name, dtype, self.manifest["files"][name], verify=verify)


def shard_key(shard: Shard, settings: ShardSettings) -> str:
    """Names the output of a shard."""
    source = shard.source.model_dump(mode="json", exclude={"paths", "training"})
    pieces = [[piece.file.path, piece.file.identity(), piece.start, piece.stop] for piece in shard.pieces]
    tokenizer = asdict(settings.tokenizer)
    del tokenizer["definition"]
    near = settings.near_duplicates
    signature = [near.num_permutations, near.ngram_words] if near else None
    limits = [settings.bucket_labels, settings.max_document_characters, signature]
    return digest([SHARD_VERSION, source, pieces, tokenizer, limits])


def open_shard(directory: Path) -> TokenizedShard:
    """Opens a finished shard."""
    return TokenizedShard(directory, read_json(directory / "manifest.json"))


def tokenize_shard(shard: Shard, settings: ShardSettings, encoder: Encoder) -> Path:
    """Reads, checks, hashes and tokenises a shard's documents; returns its directory. Finished ones are kept."""
    final = settings.directory / shard_key(shard, settings)
    if (final / "manifest.json").exists():
        return final
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with _ShardWriter(partial, settings, encoder) as writer:
        lines = []
        for number, piece in enumerate(shard.pieces):
            last = 0
            for document in read_piece(shard.source, piece, settings.max_document_characters):
                last = document.line
                writer.add(number, document)
            lines.append(last)
        writer.close(lines)
    partial.rename(final)
    return final


class _ShardWriter:
    def __init__(self, directory: Path, settings: ShardSettings, encoder: Encoder) -> None:
        self._settings, self._encoder, self._directory = settings, encoder, directory
        self._signer = Signer(settings.near_duplicates) if settings.near_duplicates else None
        names = ["tokens.bin", "documents.bin", *(["signatures.bin"] if self._signer else [])]
        self._files = {name: ChecksummedFile(directory / name) for name in [*names, "quarantine.jsonl"]}
        self._batch: list[tuple[int, Document]] = []
        self._characters = 0
        self._labels: dict[tuple[tuple[str, str], ...], int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.abandon()

    def add(self, piece: int, document: Document | BadDocument) -> None:
        if isinstance(document, BadDocument):
            self._quarantine(piece, document.line, document.reason)
            return
        self._batch.append((piece, document))
        self._characters += len(document.text)
        if self._characters >= _BATCH_CHARACTERS:
            self._flush()

    def close(self, lines: list[int]) -> None:
        self._flush()
        files = {name: file.close() for name, file in self._files.items()}
        labels = [dict(items) for items in self._labels]
        write_json(self._directory / "manifest.json", {"labels": labels, "lines": lines, "files": files})

    def _quarantine(self, piece: int, line: int, reason: str) -> None:
        record = json.dumps({"piece": piece, "line": line, "reason": reason}, ensure_ascii=False)
        self._files["quarantine.jsonl"].write(f"{record}\n".encode())

    def _flush(self) -> None:
        for (piece, document), tokens in zip(
            self._batch, self._encoder.encode([document.text for _, document in self._batch]), strict=True
        ):
            if not tokens.size:
                self._quarantine(piece, document.line, "no tokens")
                continue
            text = document.text.encode()
            record = np.zeros(1, TABLE)
            record["hash"] = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), "<u8")
            record["tokens"], record["bytes"] = tokens.size, len(text)
            record["labels"] = self._label_number(document.labels)
            record["piece"], record["line"] = piece, document.line
            self._files["documents.bin"].write(record.tobytes())
            self._files["tokens.bin"].write(tokens.astype("<u4").tobytes())
            if self._signer:
                self._files["signatures.bin"].write(self._signer.sign(document.text).astype("<u4").tobytes())
        self._batch, self._characters = [], 0

    def _label_number(self, labels: dict[str, str]) -> int:
        key = tuple((label, labels[label]) for label in self._settings.bucket_labels if label in labels)
        return self._labels.setdefault(key, len(self._labels))


_worker: tuple[ShardSettings, dict[bool, Encoder]] | None = None


def start_worker(settings: ShardSettings) -> None:
    """Prepares a worker process: the tokenizer is parsed once."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once and in silence on Ctrl-C
    _worker = (settings, {})


def work(shard: Shard) -> Path:
    """`tokenize_shard` inside a worker process."""
    assert _worker is not None
    settings, encoders = _worker
    return tokenize_shard(shard, settings, encoder_for(shard, settings, encoders))


def encoder_for(shard: Shard, settings: ShardSettings, encoders: dict[bool, Encoder]) -> Encoder:
    """The encoder a shard's source asks for, made at most once."""
    parse = shard.source.parse_special_tokens
    if parse not in encoders:
        encoders[parse] = Encoder(settings.tokenizer, parse_special_tokens=parse)
    return encoders[parse]
