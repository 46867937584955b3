"""Saving and restoring a training state, hashes included, beside dd on the same disk.

    python bench/checkpoint.py --gigabytes 1 --scratch DIRECTORY

A model with Adam's moments in float32 is saved as a run saves it and restored as a run restores it, between two plain
writes (dd, conv=fdatasync) and reads of as many bytes; what is read is dropped from the page cache first. `blocked` is
how long the training thread waits for a save to begin, and `computing` how long it has a core in that time (the rest is
waiting for other threads: on a busy machine most of it); then the same of one that is written to a local disk first
(`checkpoint.local_dir`; a directory of the same disk here) and copied from there.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from tlite_jax.checkpoint import Meta, find
from tlite_jax.checkpoint.local import LocalTier
from tlite_jax.checkpoint.parts import claim_parts
from tlite_jax.checkpoint.resume import newest_intact
from tlite_jax.checkpoint.saver import saver
from tlite_jax.config import CheckpointConfig, MeshConfig, ModelConfig
from tlite_jax.sharding import make_mesh
from tlite_jax.train.state import TrainState, abstract_state

_WIDTHS = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
_FIXED = {"head_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
_LAYER, _VOCAB = 12.1e6 * 12, 16_000  # bytes of a layer with its moments


def main() -> None:
    """Prints a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="a directory on the disk to measure; default: the system's")
    options = parser.parse_args()
    layers = max(1, round((options.gigabytes * 1e9 - _VOCAB * 1024 * 12) / _LAYER))
    model = ModelConfig(
        **_WIDTHS,
        **_FIXED,
        num_hidden_layers=layers,
        vocab_size=_VOCAB,
        tie_word_embeddings=True,
        initializer_range=0.02,
    )
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    state = _random_state(model, mesh)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        if shutil.disk_usage(scratch).free < 3 * num_bytes:
            sys.exit(f"{scratch} has no room for three times {num_bytes / 1e9:.1f} GB")
        rounds = [_measure(Path(scratch), state, model, mesh, num_bytes) for _ in range(options.repeats)]
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{num_bytes / 1e9:.2f} GB, {machine}; medians of {options.repeats} rounds")
    print("| what | seconds | GB/s | of dd |\n|---|---|---|---|")
    for name, beside in (("save", "dd write"), ("verify and restore", "dd read")):
        mine, theirs = (statistics.median(r[key] for r in rounds) for key in (name, beside))
        ratio = statistics.median(r[beside] / r[name] for r in rounds)
        print(f"| {beside} | {theirs:.2f} | {num_bytes / theirs / 1e9:.2f} | |")
        print(f"| {name} | {mine:.2f} | {num_bytes / mine / 1e9:.2f} | {ratio:.2f} |")
    for name in ("blocked", "computing"):
        plain, locally = (1e3 * statistics.median(r[key] for r in rounds) for key in (name, f"{name} locally"))
        ratio = statistics.median(r[f"{name} locally"] / r[name] for r in rounds)
        print(f"{name}: {plain:.1f} ms a save, {locally:.1f} with a local disk ({ratio:.2f} of it)")


def _random_state(model: ModelConfig, mesh: jax.sharding.Mesh) -> TrainState:
    keys = iter(range(10**6))

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not leaf.ndim:
            return jax.device_put(np.zeros((), leaf.dtype), leaf.sharding)
        chance = np.random.default_rng(next(keys))
        return jax.device_put(chance.standard_normal(leaf.shape, np.float32), leaf.sharding)

    return jax.tree.map(random, abstract_state(model, mesh))


def _measure(
    scratch: Path, state: TrainState, model: ModelConfig, mesh: jax.sharding.Mesh, size: int
) -> dict[str, float]:
    """One round; the run is deleted at its end."""
    run, plain = scratch / "run", scratch / "plain"
    found = {"dd write": _dd(f"if=/dev/zero of={plain} bs=8M count={-(-size // (8 << 20))} conv=fdatasync")}
    meta = Meta(step=1, model=model, weights_dtype="bfloat16", origin="a benchmark")
    start = time.perf_counter()
    with saver(run, CheckpointConfig()) as saving:
        begun, computing = time.perf_counter(), time.thread_time()
        saving.save(state, meta)
        found |= {"blocked": time.perf_counter() - begun, "computing": time.thread_time() - computing}
        saving.wait()
        found["save"] = time.perf_counter() - start
        assert not saving.failures()
    _drop(scratch)
    found["dd read"] = _dd(f"if={plain} of=/dev/null bs=8M")
    plain.unlink()
    start = time.perf_counter()
    reading = newest_intact(run, mesh).reading
    assert reading is not None
    assert reading.is_of(find(run), mesh)
    restored = jax.block_until_ready(reading.finish())
    found["verify and restore"] = time.perf_counter() - start
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves((state.params, state.optimizer)), strict=True)
    assert all(np.array_equal(array, expected) for array, expected in pairs)
    shutil.rmtree(run)
    return found | _measure_local(run, scratch / "disk", state, meta, mesh)


def _measure_local(run: Path, disk: Path, state: TrainState, meta: Meta, mesh: jax.sharding.Mesh) -> dict[str, float]:
    run.mkdir()
    with saver(run, CheckpointConfig(), local=LocalTier(claim_parts(run, disk, mesh), -1)) as saving:
        begun, computing = time.perf_counter(), time.thread_time()
        saving.save(state, meta)
        found = {"blocked locally": time.perf_counter() - begun, "computing locally": time.thread_time() - computing}
        saving.wait()
        assert not saving.failures()
        assert list(disk.glob("*/process-0/1"))
        saving.run_is_done()
    shutil.rmtree(run)
    shutil.rmtree(disk)
    return found


def _dd(words: str) -> float:
    start = time.perf_counter()
    subprocess.run(["dd", *words.split()], check=True, capture_output=True)
    return time.perf_counter() - start


def _drop(directory: Path) -> None:
    """Files below a directory leave the page cache; they have been brought to the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
