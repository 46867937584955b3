"""Prepares the same buckets again and again, each time in a process that kills itself somewhere, then to the end.

    python tests/data/killed_prepare.py CONFIG REFERENCE KILLS SEED

The process dies by SIGKILL at a write, an fsync or a rename that the seed chooses. What the last one leaves must equal
REFERENCE byte by byte. Prints how many died in each phase.
"""

import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasketch  # noqa: F401  (imported once, before all forks)

from tlite_jax.config_files import load_config
from tlite_jax.data.files import ChecksummedFile
from tlite_jax.data.prepare import prepare


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def at_each(owner: Any, name: str, event: Any) -> None:
    original = getattr(owner, name)

    def noted(*arguments: Any, **options: Any) -> Any:
        event()
        return original(*arguments, **options)

    setattr(owner, name, noted)


def attempt(config: Any, kill_at: int | None) -> int:
    """Prepares in a forked process; returns how many events it saw, minus that number where it was killed."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status) == (kill_at is not None), said
        return len(said)
    os.close(reading)
    seen = 0

    def event() -> None:
        nonlocal seen
        seen += 1
        os.write(writing, b".")
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for owner, name in ((ChecksummedFile, "write"), (os, "fsync"), (Path, "rename")):
        at_each(owner, name, event)
    try:
        prepare(config, config.data.tokenizer)
    finally:
        os._exit(0)


def main(config_path: str, reference: str, kills: str, seed: str) -> None:
    config, chance = load_config(Path(config_path)), random.Random(int(seed))
    expected = snapshot(Path(reference))
    directory = config.data.buckets
    phases: Counter[str] = Counter()
    for _ in range(int(kills)):
        attempt(config, chance.randint(1, 60))
        phases["manifest" if (directory / "manifest.json").exists() else "before"] += 1
        if chance.random() < 0.3 or (directory / "manifest.json").exists():
            attempt(config, None)
            assert snapshot(directory) == expected, "other bytes"
            (directory / "manifest.json").unlink()
            phases["finished"] += 1
    attempt(config, None)
    assert snapshot(directory) == expected, "other bytes"
    print(dict(phases))


if __name__ == "__main__":
    main(*sys.argv[1:])
