"""A durable checkpoint from the parts on the local disks, the very files that a save to the run's directory writes."""

import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorstore

from tlite_jax.checkpoint.peers import Talk
from tlite_jax.checkpoint.seal import publish, read_manifest, writer_of

_THREADS = 4
_INDEX = ("manifest.ocdbt", "d")  # of an item: of what the process has, not of the whole


def publish_copy(part: Path, partial: Path, final: Path, talk: Talk) -> None:
    """Copies the parts of all processes into one directory, compares it with what was written, seals and names it.

    Args:
      part: of this process, sealed.
      partial, final: where the checkpoint is put together, and its name when it is whole.
      talk: of the processes.

    Raises:
      PeerError: another process could not do its part; nothing is named then.
      OSError: a file cannot be copied, or its copy is another one.
    """
    entries = read_manifest(part)
    own = {name: entry for name, entry in entries.items() if _is_copied(name, talk.process)}
    copy_files(part, partial, own)

    def join(words: list[str]) -> str:
        for item in {name.split("/")[0] for name in entries if "/ocdbt.process_" in name}:
            merge(partial / item)
        return ""

    talk.meet("copied", decide=join)
    publish(partial, final, talk, own)


def copy_files(source: Path, target: Path, names: Collection[str]) -> None:
    """Copies some files to the same places below another directory."""
    for directory in {(target / name).parent for name in names}:
        directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda name: shutil.copyfile(source / name, target / name), names):
            pass


def merge(item: Path) -> None:
    """Makes the index of an item that all processes have written a part of, as Orbax does; it refers to their files."""
    context = tensorstore.Context()  # a shared one: only then entries are copied without what they refer to
    transaction = tensorstore.Transaction(atomic=True)
    whole = _open(item, context).with_transaction(transaction)
    for part in sorted(item.glob("ocdbt.process_*")):
        _open(part, context).experimental_copy_range_to(whole).result()
    transaction.commit_sync()


def _open(directory: Path, context: tensorstore.Context) -> tensorstore.KvStore:
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/"}, context=context).result()


def _is_copied(name: str, process: int) -> bool:
    """Whether a process brings a file: what it has written itself, process 0 also what all write alike."""
    writer = writer_of(name)
    if writer is not None:
        return writer == process
    return process == 0 and not (len(parts := name.split("/")) > 1 and parts[1] in _INDEX)
