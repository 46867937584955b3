"""Documents -> buckets: tokenise in several processes, remove duplicates, set documents aside, write.

What is written depends on the config, the tokenizer and the input files, never on the number of workers or on what runs
them. Interrupted, it goes on with the shards that are done.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlite_jax.config import RunConfig
from tlite_jax.config_files import differences
from tlite_jax.data.buckets import MANIFEST, BucketStore, is_bucket, read_store_manifest
from tlite_jax.data.join import LISTS, join_shards
from tlite_jax.data.preparation import SHARDS, Preparation, find_preparation
from tlite_jax.data.shards import Encoders, encoder_for, find_shard, start_worker, tokenize_shard, work
from tlite_jax.data.workers import run_tasks
from tlite_jax.errors import UserError

Progress = Callable[[str, int, int], None]
RunShards = Callable[[Preparation, Progress], None]

# Less input than this is tokenised sooner than worker processes start.
SMALL_BYTES = 4 << 20
_LOCK = ".lock"


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
    packing: str = "concatenate"
    split_documents: int = 0

    @property
    def fill(self) -> float:
        """The share of the rows' places that hold tokens."""
        return self.tokens / max(1, self.tokens + self.padding_tokens)


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did, or had done before.

    Attributes:
      directory: the buckets'.
      reused: nothing was to be done.
      documents_read: those that could be used.
      buckets: what became of them.
      quarantined: source -> reason -> documents that could not be used.
      contaminated: source -> evaluation set -> how many documents were dropped and cut.
      evaluation_items: evaluation set -> its items, and how many were too short to be looked for.
      label_counts: label that labellers give -> value -> documents read.
    """

    directory: str
    reused: bool
    documents_read: int
    buckets: tuple[BucketReport, ...]
    quarantined: dict[str, dict[str, int]]
    contaminated: dict[str, dict[str, dict[str, int]]]
    evaluation_items: dict[str, dict[str, int]]
    label_counts: dict[str, dict[str, int]]


def prepare(
    config: RunConfig,
    tokenizer_dir: Path,
    progress: Progress | None = None,
    *,
    force: bool = False,
    run_shards: RunShards | None = None,
) -> PrepareReport:
    """Makes `config.data.buckets` from `config.data.prepare`, or finds that it is made already.

    Args:
      config: the run.
      tokenizer_dir: a Hugging Face tokenizer directory.
      progress: called with (stage, done, total).
      force: make the buckets anew, whatever is there.
      run_shards: tokenises all shards of a preparation, for instance on a cluster; None does it on this machine.

    Returns:
      Counts per bucket and source.

    Raises:
      UserError: anything in the input, the config or the output directory that the user can mend.
    """
    return finish(find_preparation(config, tokenizer_dir), progress, force=force, run_shards=run_shards or run_here)


def finish(
    preparation: Preparation, progress: Progress | None, *, force: bool, run_shards: RunShards | None
) -> PrepareReport:
    """Does what of a preparation is not done yet; without `run_shards` its shards must all be tokenised."""
    target = preparation.buckets
    report = progress or (lambda *_: None)
    try:
        if target.is_dir():
            _refuse_foreign(target)  # before a lock is laid there
        with _claim(target):
            if not force and (existing := find_finished(preparation)) is not None:
                return existing
            _refuse_foreign(target)
            if run_shards is not None:
                if preparation.items is not None:
                    preparation.items.build()
                run_shards(preparation, report)
            manifest = join_shards(preparation, _finished_shards(preparation), report)
            return _report(target, manifest, reused=False)
    except OSError as error:
        raise UserError(f"cannot write buckets to {target}: {error.strerror or error}") from error


def find_finished(preparation: Preparation) -> PrepareReport | None:
    """Returns what is there already, made from the same input; None where nothing is finished.

    Raises:
      UserError: there are buckets made from something else.
    """
    existing = read_store_manifest(preparation.buckets)
    if existing is None:
        return None
    origin = preparation.origin()
    if existing["origin"] == origin:
        return _report(preparation.buckets, existing, reused=True)
    changed = "; ".join(_changes(existing["origin"], origin))
    raise UserError(f"{preparation.buckets} holds buckets made from something else ({changed}); add --force")


def run_here(preparation: Preparation, progress: Progress) -> None:
    """Tokenises the shards of a preparation on this machine."""
    shards, settings = preparation.shards(), preparation.settings()
    total = len(shards)
    progress("tokenising", 0, total)
    if preparation.num_workers == 1 or total == 1 or preparation.input_bytes < SMALL_BYTES:
        encoders: Encoders = {}
        for done, shard in enumerate(shards, 1):
            tokenize_shard(shard, settings, encoder_for(shard, settings, encoders))
            progress("tokenising", done, total)
        return
    run_tasks(
        work,
        shards,
        preparation.num_workers,
        lambda done, total: progress("tokenising", done, total),
        start=start_worker,
        start_arguments=(settings,),
    )


def _finished_shards(preparation: Preparation) -> list[Path]:
    shards, settings = preparation.shards(), preparation.settings()
    found = [find_shard(shard, settings) for shard in shards]
    if missing := found.count(None):
        raise UserError(f"{missing} of {len(shards)} shards are not tokenised; start the same command again")
    return [directory for directory in found if directory is not None]


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
    ours = {_LOCK, SHARDS, *LISTS, MANIFEST, f".{MANIFEST}.partial"}
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in ours and not is_bucket(path))
    if foreign:
        raise UserError(f"{directory} holds {foreign[0]}, which prepare did not write; choose an empty data.buckets")


def _report(directory: Path, manifest: dict[str, Any], *, reused: bool) -> PrepareReport:
    fields = set(BucketReport.__dataclass_fields__)
    buckets = []
    for name, bucket in BucketStore.open(directory).buckets.items():
        exact, near = manifest["duplicates"][name]
        known = {key: value for key, value in bucket.manifest.items() if key in fields}
        buckets.append(BucketReport(**known, exact_duplicates=exact, near_duplicates=near))
    names = ("documents_read", "quarantined", "contaminated", "evaluation_items", "label_counts")
    # Buckets of earlier versions know nothing of contamination and labellers.
    counts = {name: manifest.get(name, {}) for name in names}
    return PrepareReport(str(directory), reused, buckets=tuple(buckets), **counts)
