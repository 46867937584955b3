"""Reading arrays into shards: each byte once where chunks are parts of shards, by TensorStore where they are not."""

import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import tiny
from tests.checkpoint.test_checkpoint import MODEL, SPECS, assert_equal, random_state, random_tree, save
from tests.checkpoint.test_seal import flip
from tlite_jax.checkpoint import StateReading, find, reader, resume, save_model, steps_on_disk
from tlite_jax.checkpoint.reader import Reading, Target, read_sharded
from tlite_jax.checkpoint.resume import newest_intact
from tlite_jax.checkpoint.seal import check_files, read_manifest
from tlite_jax.checkpoint.verify import verify_run
from tlite_jax.errors import UserError
from tlite_jax.sharding import abstract_params, pad_params

SAVED_ON = (1, 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 3 and 12."""
    run = tmp_path_factory.mktemp("read") / "run"
    save(run, 3, 12, mesh=tiny.mesh(*SAVED_ON))
    return run


@pytest.fixture
def read_again(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read once more than for their verification."""
    files: list[Path] = []
    fill = reader._fill
    monkeypatch.setattr(reader, "_fill", lambda place, *rest: files.append(place.file) or fill(place, *rest))
    return files


def targets_bytes(reading: StateReading) -> int:
    return sum(len(target.memory) for targets in reading.targets().values() for target in targets)


@pytest.mark.parametrize("shape", [SAVED_ON, (2, 2), (1, 1), (1, 3), (1, 8)])
def test_a_state_is_read_while_it_is_verified(shape: tuple[int, int], saved: Path, read_again: list[Path]) -> None:
    mesh = tiny.mesh(*shape)
    reading = newest_intact(saved, mesh).reading
    assert reading is not None
    assert reading.is_of(find(saved), mesh)
    assert not reading.is_of(find(saved, 3), mesh)
    assert not reading.is_of(find(saved), tiny.mesh(1, 7))
    if shape[1] == SAVED_ON[1]:  # small arrays lie in the index
        assert targets_bytes(reading) > 0.9 * reading.bytes
    params, adam = reading.finish()
    assert not reading.is_of(find(saved), mesh)
    expected = random_state(mesh)
    assert_equal((params, adam), (expected.params, expected.optimizer))
    assert read_again == []


def test_what_another_process_verifies_is_read_besides(saved: Path, read_again: list[Path]) -> None:
    mesh = tiny.mesh(*SAVED_ON)
    reading = StateReading(find(saved), mesh)
    names = sorted(reading.targets())
    entries = read_manifest(find(saved).path)
    assert check_files(find(saved).path, {names[0]: entries[names[0]]}, targets=reading.targets()) == []
    reading.filled = frozenset(names[:1])
    expected = random_state(mesh)
    assert_equal(reading.finish(), (expected.params, expected.optimizer))
    assert {file.name for file in read_again} == {Path(name).name for name in names[1:]}


@pytest.mark.parametrize("file", ["params/manifest.ocdbt", "meta/metadata", "optimizer/ocdbt.process_0/d"])
def test_the_state_of_a_damaged_step_is_not_taken(file: str, saved: Path, tmp_path: Path) -> None:
    run, mesh = shutil.copytree(saved, tmp_path / "run"), tiny.mesh(*SAVED_ON)
    place = run / "checkpoints" / "12" / file
    flip(max(place.iterdir(), key=lambda path: path.stat().st_size) if place.is_dir() else place, 30)
    reading = newest_intact(run, mesh).reading
    assert reading is not None
    assert steps_on_disk(run) == [3]
    assert reading.is_of(find(run, 3), mesh)
    expected = random_state(mesh)
    assert_equal(reading.finish(), (expected.params, expected.optimizer))


def test_a_state_too_large_for_the_host_is_verified_first(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "_available_memory", lambda: 1000)
    assert newest_intact(saved, tiny.mesh(1, 1)).reading is None
    monkeypatch.undo()
    assert resume._available_memory() > 1 << 20


def test_an_imported_model_is_read_from_its_files_to_its_shards(tmp_path: Path, read_again: list[Path]) -> None:
    tree = random_tree(6)
    save_model(tmp_path / "m", tree, MODEL, weights_dtype="float32", origin="there")
    params = find(tmp_path / "m").path / "params"
    for shards, straight in ((1, len(jax.tree.leaves(tree))), (2, 0)):
        read_again.clear()
        wanted = abstract_params(SPECS, tiny.mesh(1, shards))
        assert_equal(read_sharded(params, wanted), pad_params(tree, SPECS, shards))
        assert len({file.parent for file in read_again}) == straight  # a chunk has rows of several shards
    (file, *_) = params.glob("blocks.gate/1.*")
    flip(file, 30)
    (damage,) = verify_run(tmp_path / "m").damages
    assert damage.file == f"checkpoints/0/params/blocks.gate/{file.name}"


@pytest.mark.parametrize("compressed", [True, False])
def test_orbaxs_own_arrays_are_read_and_converted(compressed: bool, tmp_path: Path) -> None:
    tree = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), random_tree(6))
    handler = ocp.PyTreeCheckpointHandler(use_compression=compressed)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "params", args=ocp.args.PyTreeSave(tree))
    for shards in (1, 4):
        for dtype in ("float32", "bfloat16"):
            wanted = abstract_params(SPECS, tiny.mesh(1, shards), dtype)
            expected = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), pad_params(tree, SPECS, shards))
            assert_equal(read_sharded(tmp_path / "params", wanted), expected)


def test_what_is_absent_or_cut_is_said(saved: Path, tmp_path: Path) -> None:
    step = shutil.copytree(find(saved).path, tmp_path / "run" / "checkpoints" / "12")
    abstract = abstract_params(SPECS, tiny.mesh(*SAVED_ON))
    with pytest.raises(UserError, match=r"params: other cannot be opened: .*"):
        Reading(step / "params", {"other": abstract["embedding"]})
    reading = Reading(step / "params", abstract)
    for file in reading.targets():
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"params: .* cannot be read: .* ends early"):
        reading.finish()
    (step / "params" / "manifest.ocdbt").write_bytes(b"?")
    with pytest.raises(UserError, match=r"params cannot be opened"):
        Reading(step / "params", abstract)


def test_targets_get_the_bytes_at_their_offsets(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 9_000_000, dtype=np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    spans = [(8_000_001, 9_000_000), (0, 3), (3, 10), (100, 5_000_000)]
    memory = [np.zeros(end - begin, np.uint8) for begin, end in spans]
    targets = [Target(begin, memoryview(part)) for (begin, _), part in zip(spans, memory, strict=True)]
    entries = {"file": {"bytes": len(content), "hash": "?"}}
    (damage,) = check_files(tmp_path, entries, targets={"file": targets})
    assert damage.problem == "its bytes are not those that were written"
    for (begin, end), part in zip(spans, memory, strict=True):
        assert np.array_equal(part, content[begin:end])


def test_the_model_has_arrays_of_both_kinds() -> None:
    sizes = [np.prod(spec.shape) * 4 for spec in jax.tree.leaves(SPECS, is_leaf=lambda leaf: hasattr(leaf, "shape"))]
    assert min(sizes) < 1024 < max(sizes)
    assert MODEL.num_hidden_layers > 1
