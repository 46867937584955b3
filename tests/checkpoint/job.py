"""One of several processes that save and verify checkpoints together; arguments: PORT COUNT PROCESS DIRECTORY.

Writes what it has found as JSON. Something goes wrong in the last process only.
"""

import contextlib
import json
import os
import resource
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from tests.checkpoint.test_checkpoint import meta, random_state
from tests.checkpoint.test_seal import flip
from tlite_jax.checkpoint import find, restore_optimizer, restore_params, seal, steps_on_disk
from tlite_jax.checkpoint.resume import newest_intact
from tlite_jax.checkpoint.saver import Saver, saver
from tlite_jax.checkpoint.seal import read_manifest
from tlite_jax.checkpoint.verify import damages_of
from tlite_jax.config import CheckpointConfig, MeshConfig
from tlite_jax.sharding import make_mesh
from tlite_jax.train.state import TrainState


def save(saving: Saver, state: TrainState, step: int) -> list[str]:
    saving.save(state, meta(step))
    saving.wait()
    return saving.failures()


@contextlib.contextmanager
def full_disk(*, here: bool) -> Iterator[None]:
    """No file of this process can grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_with_an_unreadable_disk(saving: Saver, state: TrainState, step: int, *, here: bool) -> list[str]:
    """What is written cannot be brought to the disk."""
    real = seal.sync

    def fails(path: Path) -> None:
        raise OSError(5, "Input/output error")

    seal.sync = fails if here else real
    try:
        return save(saving, state, step)
    finally:
        seal.sync = real


def main(run: Path) -> dict[str, object]:
    mesh = make_mesh(MeshConfig())
    state = random_state(mesh)
    here = jax.process_index() == jax.process_count() - 1
    found: dict[str, object] = {}
    with saver(run, CheckpointConfig(keep_latest=9)) as saving:
        found["whole"] = save(saving, state, 1)
        with full_disk(here=here):
            found["full"] = save(saving, state, 2)
        found["full step"] = saving.failed_step
        found["unreadable"] = save_with_an_unreadable_disk(saving, state, 3, here=here)
        found["whole again"] = save(saving, state, 4)
    found["left"] = sorted(path.name for path in (run / "checkpoints").iterdir())
    hashed: list[str] = []
    real = seal._entry
    seal._entry = lambda path, *rest: hashed.append(path.name) or real(path, *rest)
    found["intact"] = [str(damage) for damage in damages_of(run / "checkpoints" / "4")]
    found["read"] = len(hashed)
    newest = find(run)
    restored = TrainState(state.step, restore_params(newest, mesh), restore_optimizer(newest, mesh))
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True)
    found["equal"] = all(
        np.array_equal(one.data, other.data)
        for array, expected in pairs
        for one, other in zip(array.addressable_shards, expected.addressable_shards, strict=True)
    )
    multihost_utils.sync_global_devices("compared")
    if jax.process_index() == 0:
        names = [name for name in read_manifest(newest.path) if "ocdbt.process_1/d/" in name]
        flip(newest.path / names[0])
    multihost_utils.sync_global_devices("flipped")
    found["damaged"] = [str(damage) for damage in damages_of(newest.path)]
    newest_intact(run)
    found["steps"] = steps_on_disk(run)
    return found


if __name__ == "__main__":
    port, count, process, directory = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(process))
    try:
        outcome = main(Path(directory) / "run")
    except Exception:
        traceback.print_exc()
        os._exit(1)  # the other one is not waited for
    (Path(directory) / f"{process}.json").write_text(json.dumps(outcome))
