"""Bits flipped and files cut short, in everything that is written to last: is each one found?

    python -m tests.faults.flips --flips 1000 --cuts 200 --seed 1

One bit of one file is changed, or one file is cut at a random byte, and the thing is verified as `launch verify` does;
then the file is put back. Files are chosen by their number of bytes or, as often, all alike, so that small ones
(manifests, lists of hashes) have their turn. What is not found is an error that names file, byte and bit.
"""

import argparse
import collections
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from launch.verify import kind_of
from tests.bridge.fuzzing import made_gguf, made_hf
from tests.faults import report, runs
from tlite_jax.errors import UserError


class Artefact(NamedTuple):
    """Something that was written: what to call it, what is damaged, and what is given to `verify`."""

    name: str
    directory: Path
    verified: Path


def make_artefacts(scratch: Path) -> list[Artefact]:
    """Buckets, a run's checkpoints, a Hugging Face export of several shards and a GGUF file."""
    data = runs.make_data(scratch / "data")
    runs.undisturbed(data, scratch)
    run = scratch / "undisturbed"
    exported = runs.Child(lambda: _export(scratch), scratch / "export.log")
    assert exported.wait() == 0, exported.log.read_text()
    return [
        Artefact("buckets", data / "buckets", data / "buckets"),
        Artefact("checkpoints", run / "checkpoints", run),
        Artefact("HF export", scratch / "hf", scratch / "hf"),
        Artefact("GGUF export", scratch / "gguf", scratch / "gguf"),
    ]


def _export(scratch: Path) -> None:
    made_hf(scratch / "hf", max_shard_bytes=30_000)
    made_gguf(scratch / "gguf")


def is_found(artefact: Artefact) -> bool:
    """Whether `verify` complains."""
    try:
        return bool(kind_of(artefact.verified).verify(artefact.verified, None).damages)
    except UserError:
        return True


def damage(artefact: Artefact, chance: np.random.Generator, *, cut: bool) -> None:
    """Damages one file in one way, looks whether it is found, and puts it back.

    Raises:
      AssertionError: it was not.
    """
    files = sorted(path for path in artefact.directory.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = np.array([path.stat().st_size for path in files])
    weights = sizes / sizes.sum() if chance.random() < 0.5 else None
    file = files[int(chance.choice(len(files), p=weights))]
    intact = file.read_bytes()
    at, bit = int(chance.integers(len(intact))), int(chance.integers(8))
    spoiled = intact[:at] if cut else intact[:at] + bytes([intact[at] ^ 1 << bit]) + intact[at + 1 :]
    what = f"cut at byte {at} of {len(intact)}" if cut else f"bit {bit} of byte {at}"
    file.write_bytes(spoiled)
    try:
        assert is_found(artefact), f"{artefact.name}: {file.relative_to(artefact.directory)}: {what} was not found"
    finally:
        file.write_bytes(intact)


def sweep(
    artefacts: list[Artefact], count: int, seed: int, *, cut: bool, report: Callable[[str], None] | None = None
) -> dict[str, int]:
    """Damages artefacts in turn; returns how often each was.

    Args:
      artefacts: intact.
      count: damages in all.
      seed: of files, bytes and bits.
      cut: truncations instead of flipped bits.
      report: takes what was not found; None: that is raised.
    """
    done: collections.Counter[str] = collections.Counter()
    for number in range(count):
        artefact = artefacts[number % len(artefacts)]
        try:
            damage(artefact, np.random.default_rng([seed, number]), cut=cut)
        except AssertionError as error:
            if report is None:
                raise
            report(str(error))
        done[artefact.name] += 1
    return dict(done)


def main() -> None:
    """Runs both sweeps and prints what was not found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    missed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tlite-flips-") as scratch:
        artefacts = make_artefacts(Path(scratch))
        assert not any(is_found(artefact) for artefact in artefacts), "damaged before anything was done"
        for cut, count in ((False, arguments.flips), (True, arguments.cuts)):
            if not count:
                continue
            began, before = time.monotonic(), len(missed)
            done = sweep(artefacts, count, arguments.seed, cut=cut, report=missed.append)
            found = count - len(missed) + before
            words = "truncations" if cut else "flipped bits"
            report.tell(count=found, note=f"{found} of {count} found")
            print(f"{found} of {count} {words} found, {time.monotonic() - began:.0f} s: {done}")
    print("".join(f"not found: {line}\n" for line in missed), end="")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
