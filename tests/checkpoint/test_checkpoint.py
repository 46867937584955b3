"""Checkpoints: whole or absent, exact on any mesh, kept as asked, refused when they are not ours."""

import contextlib
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from tests import tiny
from tlite_jax import checkpoint as checkpoints
from tlite_jax.checkpoint import (
    Checkpoint,
    Meta,
    array_files,
    find,
    open_params,
    restore_optimizer,
    restore_params,
    save_model,
)
from tlite_jax.checkpoint.saver import saver
from tlite_jax.checkpoint.verify import verify_run
from tlite_jax.config import CheckpointConfig, ModelConfig
from tlite_jax.data.segments import Segment
from tlite_jax.errors import UserError
from tlite_jax.model.decoder import param_specs
from tlite_jax.optimizer import AdamState
from tlite_jax.sharding import FSDP, map_specs, pad_params, padded_shape
from tlite_jax.train.state import TrainState, abstract_state, shardings

MODEL = ModelConfig(**{**tiny.MODEL, "attention_bias": True, "tie_word_embeddings": False})
SPECS = param_specs(MODEL)


def random_tree(seed: int) -> dict:
    """Logical shapes, float32."""
    rng = np.random.default_rng(seed)
    return map_specs(lambda spec: rng.standard_normal(spec.shape, dtype=np.float32), SPECS)


def random_state(mesh: Mesh, seed: int = 0) -> TrainState:
    """A state of random numbers in its shards, padding zero."""
    params, mu, nu = (pad_params(random_tree(seed + i), SPECS, mesh.shape[FSDP]) for i in range(3))
    state = TrainState(np.int32(7), params, AdamState(np.int32(11), mu, nu))
    return jax.device_put(state, shardings(abstract_state(MODEL, mesh)))


def meta(step: int, **changes) -> Meta:
    return Meta(**{"step": step, "model": MODEL, "weights_dtype": "bfloat16", "origin": "a test", **changes})


def save(run: Path, *steps: int, mesh: Mesh | None = None, **config) -> None:
    with saver(run, CheckpointConfig(**{"keep_latest": 99, **config})) as saving:
        for step in steps:
            saving.save(random_state(mesh or tiny.mesh(1, 1)), meta(step))


def assert_equal(tree, expected) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), tree, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 3 and 12, saved on a mesh of 2 x 4."""
    run = tmp_path_factory.mktemp("saved") / "run"
    save(run, 3, 12, mesh=tiny.mesh(2, 4))
    return run


@pytest.mark.parametrize("shape", [(2, 4), (1, 8), (8, 1), (1, 3), (1, 1), (3, 2)])
def test_restores_exactly_on_any_mesh(shape: tuple[int, int], saved: Path) -> None:
    mesh, found = tiny.mesh(*shape), find(saved)
    params, adam = restore_params(found, mesh), restore_optimizer(found, mesh)
    wanted = abstract_state(MODEL, mesh)
    for tree, seed in ((params, 0), (adam.mu, 1), (adam.nu, 2)):
        assert_equal(tree, pad_params(random_tree(seed), SPECS, shape[1]))
        assert shardings(tree) == shardings(wanted.params)
    assert adam.num_updates == 11
    assert adam.num_updates.dtype == np.int32


def test_padding_really_differs_between_those_meshes() -> None:
    shapes = {padded_shape(SPECS["embedding"], shards) for shards in (1, 2, 3, 4, 8)}
    assert len(shapes) >= 4


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_opened_params_are_read_slice_by_slice(dtype: type, saved: Path, tmp_path: Path) -> None:
    params = jax.tree.map(lambda x: x.astype(dtype), random_tree(4))
    save_model(tmp_path / "m", params, MODEL, weights_dtype=np.dtype(dtype).name, origin="there")
    for run, expected in ((tmp_path / "m", params), (saved, random_tree(0))):
        opened = open_params(find(run))
        assert_equal(jax.tree.map(np.asarray, opened), expected)
        gate = opened["blocks"]["gate"]
        assert np.array_equal(np.asarray(gate[1, 3:7]), expected["blocks"]["gate"][1, 3:7])
        assert gate.chunk_layout.read_chunk.shape[0] == 1  # a layer
    (tmp_path / "m" / "checkpoints" / "0" / "params" / "blocks.gate" / ".zarray").unlink()
    with pytest.raises(UserError, match=r"blocks\.gate cannot be opened"):
        open_params(find(tmp_path / "m"))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_an_imported_model_keeps_its_dtype_and_trains_in_float32(dtype: type, tmp_path: Path) -> None:
    params = jax.tree.map(lambda x: x.astype(dtype), random_tree(4))
    name = np.dtype(dtype).name
    others = {"lm_head.weight": "float32"}
    save_model(tmp_path / "m", params, MODEL, weights_dtype=name, origin="there", tensor_dtypes=others)
    found = find(tmp_path / "m")
    assert_equal(tiny.params_of(found), params)
    restored = restore_params(found, tiny.mesh(1, 8))
    as_float32 = jax.tree.map(lambda x: x.astype(np.float32), params)
    assert_equal(restored, pad_params(as_float32, SPECS, 8))
    assert (found.step, found.has_optimizer, found.meta.weights_dtype, found.meta.origin) == (0, False, name, "there")
    assert found.meta.tensor_dtypes == others
    assert found.meta.config is None
    with pytest.raises(UserError, match=r"holds no optimizer state; use init_from.optimizer: reset"):
        restore_optimizer(found, tiny.mesh(1, 1))


def test_find_takes_a_run_a_step_or_a_path(saved: Path) -> None:
    newest = find(saved)
    assert (newest.run, newest.step, newest.path) == (saved, 12, saved / "checkpoints" / "12")
    assert newest == find(saved, 12) == find(saved / "checkpoints" / "12") == find(saved / "checkpoints" / "12", 3)
    assert find(saved, 3).step == find(saved / "checkpoints" / "3").step == 3
    assert newest.has_optimizer
    assert newest.tokenizer_dir == saved / "tokenizer"
    assert checkpoints.steps_on_disk(saved) == [3, 12]


def refusal(path: Path, step: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        find(path, step)
    (line,) = str(caught.value).splitlines()
    return line


def test_what_is_not_there_is_said_with_the_mend(saved: Path, tmp_path: Path) -> None:
    absent = refusal(tmp_path / "absent")
    assert absent.startswith(f"no checkpoint in {tmp_path / 'absent'}; give a run directory")
    assert refusal(saved, 5) == f"{saved} has no checkpoint of step 5; it has 3, 12"
    assert "has no checkpoint of step 7" in refusal(saved / "checkpoints" / "7")
    (tmp_path / "file").write_text("")
    assert "no checkpoint in" in refusal(tmp_path / "file")


def test_meta_says_what_the_arrays_mean(tmp_path: Path) -> None:
    segments = (Segment(0, "aa"), Segment(96, "bb"))
    full = meta(4, rows_consumed=120, segments=segments, schedule_offset=9, config={"seed": 1, "x": [None, 1e-5]})
    with saver(tmp_path, CheckpointConfig()) as saving:
        saving.save(random_state(tiny.mesh(1, 1)), full)
    assert find(tmp_path).meta == full


def edit_meta(found: Checkpoint, text: str | None) -> None:
    file = found.path / "meta" / "metadata"
    if text is None:
        file.unlink()
    else:
        file.write_text(text)


def test_other_formats_and_damage_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = find(tmp_path)
    values = json.loads((found.path / "meta" / "metadata").read_text())
    edit_meta(found, json.dumps({**values, "format_version": 3}))
    assert refusal(tmp_path).endswith("checkpoint format 3, this version reads 1 and 2")
    edit_meta(found, json.dumps({**values, "rows_consumd": 1}))
    assert "rows_consumd: unknown key; did you mean 'rows_consumed'?" in refusal(tmp_path)
    for text in ('{"format_version": 1', "[]", None):
        edit_meta(found, text)
        assert str(found.path) in refusal(tmp_path)


def test_what_is_unfinished_is_never_listed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in ("5.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp-1700000000", "6.deleting", "notes", "-7", "٨"):
        (tmp_path / "checkpoints" / name / "params").mkdir(parents=True)
    (tmp_path / "checkpoints" / "9").write_text("a file")
    assert checkpoints.steps_on_disk(tmp_path) == [1]
    assert find(tmp_path).step == 1


def test_a_save_shows_only_when_it_is_whole(tmp_path: Path) -> None:
    """Whenever the directory is looked at, what it lists restores."""
    seen = set()
    with saver(tmp_path, CheckpointConfig(keep_latest=99)) as saving:
        for step in range(1, 4):
            saving.save(random_state(tiny.mesh(1, 1)), meta(step))
            for listed in checkpoints.steps_on_disk(tmp_path):
                assert find(tmp_path, listed).meta.step == listed
                tiny.params_of(find(tmp_path, listed))
                seen.add(listed)
    assert {1, 2} <= seen
    assert checkpoints.steps_on_disk(tmp_path) == [1, 2, 3]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_what_a_killed_save_left_does_not_stand_in_the_way(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in ("2.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp", "1.deleting"):
        (tmp_path / "checkpoints" / name / "params").mkdir(parents=True)
    save(tmp_path, 2, 3, keep_latest=1)
    # Nor does it go on holding disk.
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert_equal(tiny.params_of(find(tmp_path)), random_tree(0))


@pytest.mark.parametrize(
    ("latest", "every", "kept"),
    [(1, None, [9]), (2, None, [8, 9]), (2, 3, [3, 6, 8, 9]), (99, None, list(range(3, 10)))],
)
def test_retention_keeps_the_latest_and_every_so_many(
    latest: int, every: int | None, kept: list[int], tmp_path: Path
) -> None:
    save(tmp_path, *range(3, 10), keep_latest=latest, keep_every=every)
    assert checkpoints.steps_on_disk(tmp_path) == kept
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(map(str, kept))


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    state = random_state(tiny.mesh(1, 8))
    with saver(tmp_path, CheckpointConfig()) as saving:
        saving.save(state, meta(1))
        jax.block_until_ready(overwrite(state))
    assert_equal(tiny.params_of(find(tmp_path)), random_tree(0))


class Recorded:
    """An array that lies elsewhere: says which slices of it were asked for."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape, self.dtype, self.size = array.shape, array.dtype, array.size
        self.asked: list[int] = []
        self.forgotten: list[int] = []

    def __getitem__(self, index) -> np.ndarray:
        part = self._array[index]
        self.asked.append(part.nbytes)
        return part

    def forget(self, rows: slice, *layer: int) -> None:
        self.forgotten.append(self._array[(*layer, rows)].nbytes)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_a_model_is_written_chunk_by_chunk_and_restored_as_orbaxs_own(
    dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_files, "CHUNK_BYTES", 1000)  # no rows of the tiny model divide by it
    monkeypatch.setattr(array_files, "_PIECE_BYTES", 300)
    tree = jax.tree.map(lambda x: x.astype(dtype), random_tree(5))
    lazy = jax.tree.map(Recorded, tree)
    said: list[tuple[int, int]] = []
    options = {"weights_dtype": np.dtype(dtype).name, "origin": "there"}
    save_model(tmp_path / "m", lazy, MODEL, **options, report=lambda done, total: said.append((done, total)))
    for leaf in jax.tree.leaves(lazy):
        row_bytes = leaf.size // np.prod(leaf.shape[:-1], dtype=int) * leaf.dtype.itemsize
        assert sum(leaf.asked) == sum(leaf.forgotten) == leaf.size * leaf.dtype.itemsize  # each byte once
        assert max(leaf.asked) <= 300 + row_bytes
        assert max(leaf.forgotten) <= 1000 + row_bytes
    assert said[-1][0] == said[-1][1] == sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    found = find(tmp_path / "m")
    assert_equal(tiny.params_of(found), tree)
    assert_equal(jax.tree.map(np.asarray, open_params(found)), tree)
    for shards in (3, 8):
        restored = restore_params(found, tiny.mesh(1, shards), np.dtype(dtype).name)
        assert_equal(restored, pad_params(tree, SPECS, shards))
    assert not verify_run(tmp_path / "m").damages
    theirs = tmp_path / "orbax"
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(theirs, tree)
    with contextlib.closing(ocp.PyTreeCheckpointer()) as checkpointer:
        assert_equal(checkpointer.restore(found.path / "params"), tree)  # no word from us about what is in it
    ours, orbaxs = (json.loads((place / "_METADATA").read_text()) for place in (found.path / "params", theirs))
    assert ours == orbaxs


def test_a_model_whose_writing_ends_early_is_no_checkpoint(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    options = {"weights_dtype": "float32", "origin": "there"}
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "m", random_tree(0), MODEL, **options, report=stop)
    assert checkpoints.steps_on_disk(tmp_path / "m") == []
    save_model(tmp_path / "m", random_tree(1), MODEL, **options)
    assert [path.name for path in (tmp_path / "m" / "checkpoints").iterdir()] == ["0"]
    assert_equal(tiny.params_of(find(tmp_path / "m")), random_tree(1))
