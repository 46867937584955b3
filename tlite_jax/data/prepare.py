"""Documents -> buckets: tokenise in several processes, remove duplicates, set documents aside, write.

What is written depends on the config, the tokenizer and the input files, never on the number of workers. Interrupted,
it goes on with the shards that are done.
"""

import fcntl
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tlite_jax.config import DataConfig, PrepareConfig, RunConfig, digest
from tlite_jax.config_files import differences
from tlite_jax.data.assemble import Assembler
from tlite_jax.data.buckets import MANIFEST, BucketStore, is_bucket, read_store_manifest
from tlite_jax.data.corpus import MAX_BUCKETS, Corpus, bucket_names, by_bucket, join, write_quarantine
from tlite_jax.data.deduplicate import exact_duplicates, near_duplicates
from tlite_jax.data.documents import InputFile, Shard, find_files, make_shards
from tlite_jax.data.files import file_entry, sync_directory, write_json
from tlite_jax.data.row_format import FORMAT_VERSION
from tlite_jax.data.shards import ShardSettings, encoder_for, open_shard, start_worker, tokenize_shard, work
from tlite_jax.data.splits import held_out
from tlite_jax.data.tokenize import Encoder, TokenizerFile, check_vocabulary, load_tokenizer
from tlite_jax.errors import UserError

Progress = Callable[[str, int, int], None]
Ints = npt.NDArray[np.int64]

QUARANTINE, DUPLICATES = "quarantine.jsonl", "duplicates.jsonl"
# Less input than this is tokenised sooner than worker processes start.
SMALL_BYTES = 4 << 20
_SHARDS, _LOCK = ".shards", ".lock"


@dataclass(frozen=True)
class BucketReport:
    """What became of one bucket's documents."""

    name: str
    labels: dict[str, str]
    never_trained: bool
    documents: int
    tokens: int
    rows: int
    padding_tokens: int
    text_bytes: int
    held_out_documents: int
    held_out_tokens: int
    exact_duplicates: int
    near_duplicates: int


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did, or had done before (`reused`). `quarantined`: source -> reason -> documents."""

    directory: str
    reused: bool
    documents_read: int
    buckets: tuple[BucketReport, ...]
    quarantined: dict[str, dict[str, int]]


def prepare(
    config: RunConfig, tokenizer_dir: Path, progress: Progress | None = None, *, force: bool = False
) -> PrepareReport:
    """Makes `config.data.buckets` from `config.data.prepare`, or finds that it is made already.

    Args:
      config: the run.
      tokenizer_dir: a Hugging Face tokenizer directory.
      progress: called with (stage, done, total).
      force: make the buckets anew, whatever is there.

    Returns:
      Counts per bucket and source.

    Raises:
      UserError: anything in the input, the config or the output directory that the user can mend.
    """
    data, todo = config.data, config.data.prepare
    if todo is None:
        raise UserError("data.prepare is null: nothing says which documents to prepare")
    tokenizer = load_tokenizer(tokenizer_dir, data.document_start, data.document_end)
    if config.model is not None:
        check_vocabulary(tokenizer, config.model.vocab_size)
    files = {source.name: find_files(source) for source in todo.sources}
    if not any(file.bytes for found in files.values() for file in found):
        raise UserError(_empty(todo))
    origin = _origin(data, todo, tokenizer, files)
    try:
        if data.buckets.is_dir():
            _refuse_foreign(data.buckets)  # before a lock is laid there
        with _claim(data.buckets):
            if not force and (existing := read_store_manifest(data.buckets)) is not None:
                if existing["origin"] == origin:
                    return _report(data.buckets, existing, reused=True)
                changed = "; ".join(_changes(existing["origin"], origin))
                raise UserError(f"{data.buckets} holds buckets made from something else ({changed}); add --force")
            _refuse_foreign(data.buckets)
            return _prepare(data, todo, tokenizer, files, origin, progress or (lambda *_: None))
    except OSError as error:
        raise UserError(f"cannot write buckets to {data.buckets}: {error.strerror or error}") from error


def _prepare(
    data: DataConfig,
    todo: PrepareConfig,
    tokenizer: TokenizerFile,
    files: dict[str, list[InputFile]],
    origin: dict[str, Any],
    progress: Progress,
) -> PrepareReport:
    shards = [shard for source in todo.sources for shard in make_shards(source, files[source.name])]
    settings = ShardSettings(
        data.buckets / _SHARDS, tokenizer, todo.bucket_labels, todo.max_document_characters, todo.near_duplicates
    )
    directories = _tokenize(shards, settings, todo.num_workers or os.cpu_count() or 1, progress)
    corpus = join(shards, [open_shard(directory) for directory in directories])
    write_quarantine(data.buckets / QUARANTINE, shards, corpus)
    _check_corpus(corpus, todo, data.buckets / QUARANTINE)
    exact, near = _find_duplicates(corpus, todo, progress)
    names = bucket_names(corpus.keys)
    _clear(data.buckets)
    _write_duplicates(data.buckets / DUPLICATES, corpus, exact, near)
    stays = exact == np.arange(len(exact))
    stays[list(near)] = False
    digests = _write_buckets(data, todo, tokenizer.pad_id, corpus, names, stays, progress)
    removed = [np.bincount(corpus.bucket[exact != np.arange(len(exact))], minlength=len(names))]
    removed.append(np.bincount(corpus.bucket[list(near)], minlength=len(names)))
    manifest = {
        "format_version": FORMAT_VERSION,
        "origin": origin,
        "origin_hash": digest(origin),
        "tokenizer": tokenizer.hash,
        "sequence_length": data.sequence_length,
        "documents_read": len(corpus.table),
        "duplicates": {name: counts for name, *counts in zip(names, *(c.tolist() for c in removed), strict=True)},
        "quarantined": corpus.quarantined,
        "lists": {name: file_entry(data.buckets / name) for name in (QUARANTINE, DUPLICATES)},
        "buckets": digests,
    }
    write_json(data.buckets / MANIFEST, manifest)
    shutil.rmtree(data.buckets / _SHARDS, ignore_errors=True)
    return _report(data.buckets, manifest, reused=False)


def _origin(
    data: DataConfig, todo: PrepareConfig, tokenizer: TokenizerFile, files: dict[str, list[InputFile]]
) -> dict[str, Any]:
    """Everything that the buckets' bytes depend on."""
    values = todo.model_dump(mode="json", exclude={"num_workers", "max_quarantine_rate"})
    sources = values.pop("sources")
    for source in sources:
        del source["paths"]
    return {
        "prepare": values,
        "sources": {source.pop("name"): source for source in sources},
        "files": {name: [file.identity() for file in found] for name, found in files.items()},
        "tokenizer": tokenizer.hash,
        "document_start": tokenizer.document_start,
        "document_end": tokenizer.document_end,
        "sequence_length": data.sequence_length,
        "order": list(files),
    }


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs, files summarised."""
    lines = differences({**old, "files": None}, {**new, "files": None})
    for name in sorted({*old["files"], *new["files"]}):
        if old["files"].get(name) != new["files"].get(name):
            lines.append(f"the files of source {name}")
    return lines if len(lines) <= 6 else [*lines[:5], f"and {len(lines) - 5} more"]


@contextmanager
def _claim(directory: Path) -> Iterator[None]:
    """Makes the directory and keeps others from preparing into it; refuses one that cannot be written."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another prepare is writing to {directory}; wait for it or end it") from error
        yield


def _refuse_foreign(directory: Path) -> None:
    """Refuses a directory that holds anything `prepare` did not write."""
    ours = {_LOCK, _SHARDS, QUARANTINE, DUPLICATES, MANIFEST, f".{MANIFEST}.partial"}
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in ours and not is_bucket(path))
    if foreign:
        raise UserError(f"{directory} holds {foreign[0]}, which prepare did not write; choose an empty data.buckets")


def _clear(directory: Path) -> None:
    """Removes earlier buckets, the manifest first, so that what remains is never taken for whole."""
    (directory / MANIFEST).unlink(missing_ok=True)
    sync_directory(directory)
    for path in list(directory.iterdir()):
        if is_bucket(path):
            shutil.rmtree(path)


def _tokenize(shards: Sequence[Shard], settings: ShardSettings, num_workers: int, progress: Progress) -> list[Path]:
    total, done = len(shards), 0
    progress("tokenising", 0, total)
    size = sum(piece.bytes for shard in shards for piece in shard.pieces)
    if num_workers == 1 or total == 1 or size < SMALL_BYTES:
        encoders: dict[bool, Encoder] = {}
        result = []
        for shard in shards:
            result.append(tokenize_shard(shard, settings, encoder_for(shard, settings, encoders)))
            progress("tokenising", len(result), total)
        return result
    # Spawned, not forked: the parent may hold threads of jax.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_workers, total), context, initializer=start_worker, initargs=(settings,))
    try:
        futures = [pool.submit(work, shard) for shard in shards]
        for future in as_completed(futures):
            future.result()
            done += 1
            progress("tokenising", done, total)
    except BrokenProcessPool as error:
        raise UserError("a worker ended, out of memory perhaps: lower data.prepare.num_workers, start again") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [future.result() for future in futures]


def _empty(todo: PrepareConfig) -> str:
    return f"no documents in {', '.join(source.name for source in todo.sources)}: the files are empty"


def _check_corpus(corpus: Corpus, todo: PrepareConfig, quarantine: Path) -> None:
    """Refuses an empty corpus, too many bad documents, too many buckets."""
    good = len(corpus.table)
    reasons: dict[str, int] = {}
    for counts in corpus.quarantined.values():
        for reason, count in counts.items():
            reasons[reason] = reasons.get(reason, 0) + count
    bad = sum(reasons.values())
    if not good + bad:
        raise UserError(_empty(todo))
    if bad > todo.max_quarantine_rate * (good + bad) or not good:
        worst = max(reasons, key=lambda reason: reasons[reason])
        share = f"{bad} of {good + bad} documents are bad, most of them: {worst}"
        mend = f"mend them (listed in {quarantine}) or raise data.prepare.max_quarantine_rate"
        raise UserError(f"{share}; {mend if good else f'none is left (listed in {quarantine})'}")
    if len(corpus.keys) > MAX_BUCKETS:
        values: dict[str, set[str]] = {}
        for key in corpus.keys:
            for label, name in key.labels:
                values.setdefault(label, set()).add(name)
        widest = max(values, key=lambda label: len(values[label]))
        found = f"{len(corpus.keys)} buckets: label {widest!r} has {len(values[widest])} values"
        raise UserError(f"{found}; leave it out of data.prepare.bucket_labels")


def _find_duplicates(
    corpus: Corpus, todo: PrepareConfig, progress: Progress
) -> tuple[Ints, dict[int, tuple[int, float]]]:
    """Never-trained sources come first, so that what is evaluated on is removed from what is trained on."""
    order = np.argsort(~corpus.never_trained(), kind="stable")
    exact = exact_duplicates(corpus.table["hash"], order)
    config = todo.near_duplicates
    if config is None:
        return exact, {}
    unique = order[exact[order] == order]
    near = near_duplicates(
        lambda document: corpus.signature(document, config.num_permutations),
        unique,
        config,
        lambda done: progress("comparing documents", done, len(unique)),
    )
    return exact, near


def _write_duplicates(path: Path, corpus: Corpus, exact: Ints, near: dict[int, tuple[int, float]]) -> None:
    """Lists every removed document with the one that stays in its place."""
    with path.open("w", encoding="utf-8") as file:
        for document in np.flatnonzero(exact != np.arange(len(exact))).tolist():
            line = {"removed": corpus.place(document), "kept": corpus.place(int(exact[document])), "kind": "exact"}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        for removed, (kept, similarity) in near.items():
            line = {"removed": corpus.place(removed), "kept": corpus.place(kept), "kind": "near"}
            file.write(json.dumps({**line, "similarity": round(similarity, 4)}, ensure_ascii=False) + "\n")


def _write_buckets(
    data: DataConfig,
    todo: PrepareConfig,
    pad_id: int,
    corpus: Corpus,
    names: Sequence[str],
    stays: npt.NDArray[np.bool_],
    progress: Progress,
) -> dict[str, str]:
    """Splits and writes every bucket, those too whose documents were all duplicates; returns manifests' digests."""
    assembler = Assembler(corpus, data.buckets, sequence_length=data.sequence_length, pad_id=pad_id)
    digests = {}
    for number, members in enumerate(by_bucket(corpus.bucket, len(names))):
        documents = members[stays[members]]
        if corpus.keys[number].never_trained:
            aside = np.ones(len(documents), bool)
        else:
            aside = held_out(corpus.table["hash"][documents], todo.held_out)
        digests[names[number]] = assembler.write(number, names[number], documents[~aside], documents[aside])
        progress("writing buckets", number + 1, len(names))
    return digests


def _report(directory: Path, manifest: dict[str, Any], *, reused: bool) -> PrepareReport:
    fields = set(BucketReport.__dataclass_fields__)
    buckets = []
    for name, bucket in BucketStore.open(directory).buckets.items():
        exact, near = manifest["duplicates"][name]
        known = {key: value for key, value in bucket.manifest.items() if key in fields}
        buckets.append(BucketReport(**known, exact_duplicates=exact, near_duplicates=near))
    return PrepareReport(str(directory), reused, manifest["documents_read"], tuple(buckets), manifest["quarantined"])
