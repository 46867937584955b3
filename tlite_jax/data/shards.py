"""One shard of input -> one directory of tokenised documents: a pure function, run by any executor.

The directory is named by a hash of everything it depends on, appears whole or not at all, and is found again when an
interrupted `prepare` starts anew.
"""

import hashlib
import json
import os
import secrets
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self, cast

import google_crc32c
import numpy as np
import numpy.typing as npt

from tlite_jax.config import ChatConfig, NearDuplicatesConfig, SourceConfig, digest
from tlite_jax.data.chat import ChatEncoder, ChatTemplate
from tlite_jax.data.decontaminate import decontaminate
from tlite_jax.data.documents import BadDocument, Document, Shard, read_piece
from tlite_jax.data.evaluation_items import EvaluationItems
from tlite_jax.data.files import ChecksummedFile, check_size, map_array, read_json, sync, write_json
from tlite_jax.data.labels.labelling import Labelling
from tlite_jax.data.near_duplicates import Signer, banding
from tlite_jax.data.tokenize import Encoder, TokenizerFile
from tlite_jax.errors import UserError

SHARD_VERSION = 2
# Of each document: a hash of its text, the number and crc32c of its tokens, the text's bytes, where it was read.
TABLE = np.dtype(
    [
        ("hash", "<u8", 2),
        ("tokens", "<i8"),
        ("bytes", "<i8"),
        ("line", "<i8"),
        ("crc32c", "<u4"),
        ("labels", "<u4"),
        ("piece", "<u4"),
    ]
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
    items: EvaluationItems | None
    labelling: Labelling
    chat_template: ChatTemplate | None


class DocumentEncoder(Protocol):
    """Documents -> their tokens, UNSCORED where one is never a target, or what is wrong with one."""

    def encode_documents(self, documents: Sequence[Document]) -> list[npt.NDArray[np.uint32] | BadDocument]:
        """Encodes several together."""


Encoders = dict[bool | ChatConfig, DocumentEncoder]


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

    def tokens(self) -> npt.NDArray[np.uint32]:
        """All documents' tokens, one after another, mapped; the table has a checksum of each document's."""
        return self._map("tokens.bin", np.dtype("<u4"), verify=False)

    def signatures(self, num_permutations: int) -> npt.NDArray[np.uint32]:
        """MinHash signatures, uint32 [documents, num_permutations]."""
        return self._map("signatures.bin", np.dtype("<u4")).reshape(-1, num_permutations)

    def bands(self, num_bands: int, *, verify: bool) -> npt.NDArray[np.uint64]:
        """Hashes of the signatures' bands, uint64 [documents, num_bands]."""
        return self._map("bands.bin", np.dtype("<u8"), verify=verify).reshape(-1, num_bands)

    @property
    def label_counts(self) -> dict[str, dict[str, int]]:
        """Of the labels that labellers give: how many documents have each value."""
        return self.manifest["label_counts"]

    @property
    def reasons(self) -> dict[str, int]:
        """How many documents were bad for each reason."""
        return self.manifest["reasons"]

    def quarantined(self) -> Iterator[dict[str, Any]]:
        """The bad documents: piece, line, reason and, where known, offset, detail, lost_bytes, documents."""
        return self._listed("quarantine.jsonl")

    def contamination(self) -> Iterator[dict[str, Any]]:
        """The documents that repeated evaluation items: piece, line, action, share, items, matches."""
        return self._listed("contamination.jsonl")

    @property
    def contaminated(self) -> dict[str, dict[str, int]]:
        """Of each evaluation set how many documents were dropped and cut."""
        return self.manifest["contaminated"]

    def _listed(self, name: str) -> Iterator[dict[str, Any]]:
        self._map(name, np.dtype(np.uint8))
        with (self.directory / name).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def _map(self, name: str, dtype: np.dtype[Any], *, verify: bool = True) -> npt.NDArray[Any]:
        try:
            return map_array(self.directory / name, dtype, self.manifest["files"][name], verify=verify)
        except UserError as error:
            raise UserError(f"{self.directory / name} is damaged; remove {self.directory} and start again") from error


def shard_key(shard: Shard, settings: ShardSettings) -> str:
    """Names the output of a shard."""
    source = shard.source.model_dump(mode="json", exclude={"paths", "training"})
    pieces = [[piece.file.path, piece.file.identity(), piece.start, piece.stop] for piece in shard.pieces]
    tokenizer = asdict(settings.tokenizer)
    del tokenizer["definition"]
    near = settings.near_duplicates
    signature = [near.num_permutations, near.ngram_words, *banding(near)] if near else None
    limits = [settings.bucket_labels, settings.max_document_characters, signature]
    items = settings.items.fingerprint if settings.items and shard.source.training else None
    template = settings.chat_template.hash if settings.chat_template and shard.source.chat else None
    labelling = [*settings.labelling.fingerprints, template]
    return digest([SHARD_VERSION, source, pieces, tokenizer, limits, items, labelling])


def open_shard(directory: Path) -> TokenizedShard:
    """Opens a finished shard."""
    return TokenizedShard(directory, read_json(directory / "manifest.json"))


def find_shard(shard: Shard, settings: ShardSettings) -> Path | None:
    """Returns the directory of a shard that is finished, all of its files there in their sizes; else None."""
    directory = settings.directory / shard_key(shard, settings)
    if not directory.is_dir():
        return None
    try:
        for name, expected in open_shard(directory).manifest["files"].items():
            check_size(directory / name, expected)
    except UserError:
        return None
    return directory


def tokenize_shard(shard: Shard, settings: ShardSettings, encoder: DocumentEncoder) -> Path:
    """Reads, checks, hashes and tokenises a shard's documents; returns its directory. Finished ones are kept.

    Any number of processes on any number of machines may do the same shard: one of them gives it its name.
    """
    if found := find_shard(shard, settings):
        return found
    final = settings.directory / shard_key(shard, settings)
    partial = final.with_name(f".{final.name}.{secrets.token_hex(8)}.partial")
    partial.mkdir(parents=True)
    with _ShardWriter(partial, shard.source, settings, encoder) as writer:
        lines = []
        for number, piece in enumerate(shard.pieces):
            last = 0
            for document in read_piece(shard.source, piece, settings.max_document_characters):
                last = document.line + (document.documents - 1 if isinstance(document, BadDocument) else 0)
                writer.add(number, document)
            lines.append(last)
        writer.close(lines)
    return _publish(partial, final, shard, settings)


def _publish(partial: Path, final: Path, shard: Shard, settings: ShardSettings) -> Path:
    """Renames a finished directory, in the place of a damaged one if need be; a twin's work is as good."""
    try:
        partial.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        if find_shard(shard, settings) is None:
            final.rename(partial.with_name(f"{partial.name}.damaged"))
            partial.rename(final)
        else:
            shutil.rmtree(partial, ignore_errors=True)
    sync(final.parent)
    return final


class _ShardWriter:
    def __init__(
        self, directory: Path, source: SourceConfig, settings: ShardSettings, encoder: DocumentEncoder
    ) -> None:
        self._settings, self._encoder, self._directory, self._source = settings, encoder, directory, source
        # A source that is evaluated on keeps what it is evaluated on.
        self._items = settings.items if source.training else None
        self._labellers = settings.labelling.open()
        self._signer = Signer(settings.near_duplicates) if settings.near_duplicates else None
        names = ["tokens.bin", "documents.bin", *(["signatures.bin", "bands.bin"] if self._signer else [])]
        names += ["quarantine.jsonl", "contamination.jsonl"]
        self._files = {name: ChecksummedFile(directory / name) for name in names}
        self._batch: list[tuple[int, Document]] = []
        self._characters = self._lost_bytes = 0
        self._labels: dict[tuple[tuple[str, str], ...], int] = {}
        self._reasons: Counter[str] = Counter()
        self._contaminated: dict[str, Counter[str]] = {}
        self._label_counts: dict[str, Counter[str]] = {name: Counter() for name in self._labellers.labels}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.abandon()

    def add(self, piece: int, document: Document | BadDocument) -> None:
        if isinstance(document, BadDocument):
            self._quarantine(piece, document)
            return
        self._batch.append((piece, document))
        self._characters += len(document.text)
        if self._characters >= _BATCH_CHARACTERS:
            self._flush()

    def close(self, lines: list[int]) -> None:
        self._flush()
        manifest = {
            "labels": [dict(items) for items in self._labels],
            "lines": lines,
            "reasons": dict(sorted(self._reasons.items())),
            "label_counts": {name: dict(sorted(counts.items())) for name, counts in self._label_counts.items()},
            "lost_bytes": self._lost_bytes,
            "contaminated": {name: dict(counts) for name, counts in sorted(self._contaminated.items())},
            "files": {name: file.close() for name, file in self._files.items()},
        }
        write_json(self._directory / "manifest.json", manifest)

    def _quarantine(self, piece: int, bad: BadDocument) -> None:
        self._reasons[bad.reason] += bad.documents
        self._lost_bytes += bad.lost_bytes
        record = {"piece": piece, **{name: value for name, value in asdict(bad).items() if value is not None}}
        if not bad.lost_bytes:
            del record["lost_bytes"]
        if bad.documents == 1:
            del record["documents"]
        self._list("quarantine.jsonl", record)

    def _decontaminated(self, batch: list[tuple[int, Document]]) -> list[tuple[int, Document]]:
        """Leaves out, or cuts, the documents that repeat evaluation items."""
        if self._items is None:
            return batch
        found = decontaminate([document.text for _, document in batch], self._items)
        result = []
        for number, (piece, document) in enumerate(batch):
            if number in found:
                what = found[number]
                # A conversation is not cut: what is left of it would be another one.
                action = "dropped" if what.text is None or document.messages is not None else "cut"
                self._contaminated.setdefault(what.matches[0]["set"], Counter())[action] += 1
                record = {"piece": piece, "line": document.line, "action": action, "share": what.share}
                self._list("contamination.jsonl", {**record, "items": what.items, "matches": what.matches})
                if action == "dropped":
                    continue
                document = replace(document, text=cast(str, what.text))
            result.append((piece, document))
        return result

    def _list(self, name: str, record: dict[str, Any]) -> None:
        self._files[name].write(f"{json.dumps(record, ensure_ascii=False)}\n".encode())

    def _flush(self) -> None:
        batch, self._batch, self._characters = self._labelled(self._decontaminated(self._batch)), [], 0
        encoded = self._encoder.encode_documents([document for _, document in batch])
        table = np.zeros(len(batch), TABLE)
        texts = []
        written = 0
        for (piece, document), tokens in zip(batch, encoded, strict=True):
            if isinstance(tokens, BadDocument):
                self._quarantine(piece, tokens)
                continue
            if not tokens.size:
                self._quarantine(piece, BadDocument("no tokens", document.line))
                continue
            text = document.text.encode()
            data = tokens.astype("<u4", copy=False).tobytes()
            hashed = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), "<u8")
            labels = self._label_number(document.labels)
            crc = google_crc32c.value(data)
            table[written] = (hashed, tokens.size, document.scored_bytes, document.line, crc, labels, piece)
            self._files["tokens.bin"].write(data)
            texts.append(document.text)
            written += 1
        self._files["documents.bin"].write(table[:written].tobytes())
        if self._signer and texts:
            signatures = np.stack([self._signer.sign(text) for text in texts])
            self._files["signatures.bin"].write(signatures.astype("<u4", copy=False).tobytes())
            self._files["bands.bin"].write(self._signer.bands(signatures).astype("<u8", copy=False).tobytes())

    def _labelled(self, batch: list[tuple[int, Document]]) -> list[tuple[int, Document]]:
        """The batch with the labellers' labels, counted; what they refuse is quarantined."""
        answers = self._labellers.apply(self._source.name, [document for _, document in batch])
        result = []
        for (piece, _), answer in zip(batch, answers, strict=True):
            if isinstance(answer, BadDocument):
                self._quarantine(piece, answer)
                continue
            for name, counts in self._label_counts.items():
                if name in answer.labels:
                    counts[answer.labels[name]] += 1
            result.append((piece, answer))
        return result

    def _label_number(self, labels: dict[str, str]) -> int:
        key = tuple((label, labels[label]) for label in self._settings.bucket_labels if label in labels)
        return self._labels.setdefault(key, len(self._labels))


_worker: tuple[ShardSettings, Encoders] | None = None


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


def encoder_for(shard: Shard, settings: ShardSettings, encoders: Encoders) -> DocumentEncoder:
    """The encoder a shard's source asks for, made at most once."""
    source = shard.source
    key = source.parse_special_tokens if source.chat is None else source.chat
    if key not in encoders:
        if source.chat is None:
            encoders[key] = Encoder(settings.tokenizer, parse_special_tokens=source.parse_special_tokens)
        else:
            encoders[key] = ChatEncoder(settings.tokenizer, settings.chat_template, source.chat)
    return encoders[key]
