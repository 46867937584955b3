"""Tokenised shards -> buckets: duplicates removed, documents set aside, one bucket after another written.

Memory holds some dozens of bytes a document at most, and never a document's text. What is written depends on the
preparation only.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tlite_jax.config import PrepareConfig, digest
from tlite_jax.data.buckets import MANIFEST, is_bucket
from tlite_jax.data.corpus import (
    MAX_BUCKETS,
    Corpus,
    Signatures,
    bucket_names,
    join,
    write_contamination,
    write_quarantine,
)
from tlite_jax.data.exact_duplicates import exact_duplicates
from tlite_jax.data.files import file_entry, sync, write_json
from tlite_jax.data.near_duplicates import NearDuplicates, banding, near_duplicates
from tlite_jax.data.preparation import SHARDS, Preparation, no_documents
from tlite_jax.data.row_format import FORMAT_VERSION
from tlite_jax.data.shards import open_shard
from tlite_jax.data.write_buckets import write_buckets
from tlite_jax.errors import UserError

Progress = Callable[[str, int, int], None]
Ints = npt.NDArray[np.int64]

QUARANTINE, DUPLICATES, CONTAMINATION = "quarantine.jsonl", "duplicates.jsonl", "contamination.jsonl"
LISTS = (QUARANTINE, DUPLICATES, CONTAMINATION)


def join_shards(preparation: Preparation, directories: list[Path], progress: Progress) -> dict[str, Any]:
    """Makes the buckets of a preparation whose shards are all tokenised; returns the store's manifest.

    Raises:
      UserError: too many bad documents, too many buckets, none at all, a damaged shard.
    """
    todo, target = preparation.todo, preparation.buckets
    shards = preparation.shards()
    corpus = join(shards, [open_shard(directory) for directory in directories], target / SHARDS / "corpus")
    sources = [shard.source.name for shard in shards]
    write_quarantine(target / QUARANTINE, corpus, sources)
    _check_corpus(corpus, preparation)
    exact, near = _find_duplicates(corpus, todo, progress)
    names = bucket_names(corpus.keys)
    _clear(target)
    write_contamination(target / CONTAMINATION, corpus, sources)
    _write_duplicates(target / DUPLICATES, corpus, exact, near)
    is_exact = exact != np.arange(len(exact))
    stays = ~is_exact
    stays[near.removed] = False
    digests = write_buckets(preparation, corpus, names, stays, progress)
    removed = [np.bincount(corpus.bucket[rows], minlength=len(names)).tolist() for rows in (is_exact, near.removed)]
    origin = preparation.origin()
    manifest = {
        "format_version": FORMAT_VERSION,
        "origin": origin,
        "origin_hash": digest(origin),
        "tokenizer": preparation.tokenizer.hash,
        "sequence_length": preparation.data.sequence_length,
        "documents_read": len(corpus),
        "duplicates": {name: list(counts) for name, *counts in zip(names, *removed, strict=True)},
        "quarantined": corpus.quarantined,
        "label_counts": corpus.label_counts,
        "lists": {name: file_entry(target / name) for name in LISTS},
        "contaminated": corpus.contaminated,
        "evaluation_items": preparation.items.counts if preparation.items else {},
        "buckets": digests,
    }
    write_json(target / MANIFEST, manifest)
    shutil.rmtree(target / SHARDS, ignore_errors=True)
    return manifest


def _check_corpus(corpus: Corpus, preparation: Preparation) -> None:
    """Refuses an empty corpus, too many bad documents, too many buckets."""
    todo, listed = preparation.todo, preparation.buckets / QUARANTINE
    good = len(corpus)
    reasons: dict[str, int] = {}
    for counts in corpus.quarantined.values():
        for reason, count in counts.items():
            reasons[reason] = reasons.get(reason, 0) + count
    bad = sum(reasons.values())
    if not good + bad:
        raise UserError(no_documents(todo))
    mend = f"mend them (listed in {listed}) or raise data.prepare.max_quarantine_rate"
    if bad > todo.max_quarantine_rate * (good + bad) or not good:
        worst = max(reasons, key=lambda reason: reasons[reason])
        share = f"{bad} of {good + bad} documents are bad, most of them: {worst}"
        raise UserError(f"{share}; {mend if good else f'none is left (listed in {listed})'}")
    if corpus.lost_bytes > todo.max_quarantine_rate * preparation.input_bytes:
        lost = f"{corpus.lost_bytes:,} of {preparation.input_bytes:,} bytes of input cannot be read: damaged files"
        raise UserError(f"{lost}; {mend}")
    if len(corpus.keys) > MAX_BUCKETS:
        values: dict[str, set[str]] = {}
        for key in corpus.keys:
            for label, name in key.labels:
                values.setdefault(label, set()).add(name)
        widest = max(values, key=lambda label: len(values[label]))
        found = f"{len(corpus.keys)} buckets: label {widest!r} has {len(values[widest])} values"
        raise UserError(f"{found}; leave it out of data.prepare.bucket_labels")


def _find_duplicates(corpus: Corpus, todo: PrepareConfig, progress: Progress) -> tuple[Ints, NearDuplicates]:
    """Never-trained sources come first, so that what is evaluated on is removed from what is trained on."""
    preferred = corpus.never_trained()
    progress("comparing hashes", 0, 1)
    exact = exact_duplicates(corpus.table["hash"], preferred)
    progress("comparing hashes", 1, 1)
    config = todo.near_duplicates
    if config is None:
        return exact, NearDuplicates(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    signatures = Signatures(corpus, config.num_permutations, banding(config)[0])
    unique = exact == np.arange(len(exact))
    near = near_duplicates(
        signatures.band,
        signatures.signature,
        unique,
        preferred,
        config,
        lambda done, total: progress("comparing documents", done, total),
    )
    return exact, near


def _write_duplicates(path: Path, corpus: Corpus, exact: Ints, near: NearDuplicates) -> None:
    """Lists every removed document with the one that stays in its place."""
    with path.open("w", encoding="utf-8") as file:
        # Numbers are taken one at a time: a list of them all would outweigh the columns.
        for document in np.flatnonzero(exact != np.arange(len(exact))):
            line = {"removed": corpus.place(int(document)), "kept": corpus.place(int(exact[document])), "kind": "exact"}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        for removed, kept, similarity in zip(near.removed, near.kept, near.similarity, strict=True):
            line = {"removed": corpus.place(int(removed)), "kept": corpus.place(int(kept)), "kind": "near"}
            file.write(json.dumps({**line, "similarity": round(float(similarity), 4)}, ensure_ascii=False) + "\n")


def _clear(directory: Path) -> None:
    """Removes earlier buckets, the manifest first, so that what remains is never taken for whole."""
    (directory / MANIFEST).unlink(missing_ok=True)
    sync(directory)
    for path in list(directory.iterdir()):
        if is_bucket(path):
            shutil.rmtree(path)
