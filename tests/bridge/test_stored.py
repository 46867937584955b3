"""Parameters that lie in files: sliced as numpy's arrays are, and read no further than the slice."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from tests import tiny
from tests.bridge.gguf_writing import Kind, write_gguf
from tests.bridge.tiny import tiny_model, train_tokenizer
from tlite_jax.bridge import safetensors_io, stored
from tlite_jax.bridge.gguf import import_gguf
from tlite_jax.bridge.hf import import_hf
from tlite_jax.bridge.names import rows_from_gguf
from tlite_jax.bridge.stored import StoredParam, StoredTensor, in_whole_units
from tlite_jax.errors import UserError
from tlite_jax.model.decoder import param_specs
from tlite_jax.sharding import num_shards, pad_params, place_params

LAYERS = np.random.default_rng(0).standard_normal((3, 8, 5)).astype(np.float32)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(file, begin, bytes) of every read."""
    done = []
    really = stored.read_bytes

    def counted(path: Path, offset: int, num_bytes: int) -> np.ndarray:
        done.append((path.name, offset, num_bytes))
        return really(path, offset, num_bytes)

    monkeypatch.setattr(stored, "read_bytes", counted)
    return done


@pytest.mark.parametrize(
    "index",
    [
        np.s_[:],
        np.s_[1],
        np.s_[-1, 3],
        np.s_[1, 2:5],
        np.s_[0:2, 3:8, 1:4],
        np.s_[2:3, :, 2],
        np.s_[1:1],
        np.s_[1, 5:2],
        np.s_[1:, 6:99],
        np.s_[2, 7, 4],
    ],
)
def test_slices_are_numpys_and_only_their_rows_are_read(
    index: Any, tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    save_file({f"layer{number}": layer for number, layer in enumerate(LAYERS)}, tmp_path / "x.safetensors")
    tensors = safetensors_io.read_file(tmp_path / "x.safetensors")
    param = StoredParam([tensors[f"layer{number}"] for number in range(3)], np.dtype(np.float32), is_stacked=True)
    assert (param.shape, param.ndim, param.size, len(param)) == (LAYERS.shape, 3, LAYERS.size, 3)
    np.testing.assert_array_equal(param[index], LAYERS[index], strict=True)
    whole_rows = LAYERS[index[:2] if isinstance(index, tuple) else index]
    assert sum(num_bytes for _, _, num_bytes in reads) == whole_rows.nbytes


def test_the_bytes_of_forgotten_rows_and_no_others_leave_the_page_cache(
    tmp_path: Path, reads: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({f"layer{number}": layer for number, layer in enumerate(LAYERS)}, tmp_path / "x.safetensors")
    tensors = safetensors_io.read_file(tmp_path / "x.safetensors")
    param = StoredParam([tensors[f"layer{number}"] for number in range(3)], np.dtype(np.float32), is_stacked=True)
    advised: list[tuple[int, int, int]] = []
    monkeypatch.setattr(stored.os, "posix_fadvise", lambda file, *rest: advised.append(rest))
    param.forget(slice(3, 6), 1)
    param[1, 3:6]
    assert advised == [(*reads[0][1:], stored.os.POSIX_FADV_DONTNEED)]
    (tmp_path / "x.safetensors").unlink()
    param.forget(slice(3, 6), 1)  # no error: it is a hint


def test_one_tensor_is_a_parameter_without_layers() -> None:
    tensor = StoredTensor((8, 5), "float32", lambda rows: LAYERS[0][rows])
    param = StoredParam([tensor], np.dtype(np.float64), is_stacked=False)
    assert param.shape == (8, 5)
    np.testing.assert_array_equal(np.asarray(param), LAYERS[0].astype(np.float64), strict=True)
    np.testing.assert_array_equal(param[2:4, 1:3], LAYERS[0, 2:4, 1:3].astype(np.float64), strict=True)


def test_rows_in_another_order_are_read_by_whole_heads() -> None:
    asked = []

    def read(rows: slice) -> np.ndarray:
        asked.append(rows)
        return LAYERS[0][rows]

    tensor = StoredTensor((8, 5), "float32", read)
    ordered = in_whole_units(tensor, 4, lambda rows: rows_from_gguf(rows, rows.shape[0] // 4))
    expected = rows_from_gguf(LAYERS[0], 2)
    for rows in (slice(None), slice(0, 4), slice(1, 3), slice(5, 8), slice(3, 5), slice(6, 6)):
        np.testing.assert_array_equal(ordered.read(rows), expected[rows], strict=True)
    assert asked[1:4] == [slice(0, 4), slice(0, 4), slice(4, 8)]


def test_a_file_that_is_cut_while_it_is_read_is_refused_in_one_line(tmp_path: Path) -> None:
    save_file({"x": LAYERS}, tmp_path / "x.safetensors")
    tensor = safetensors_io.read_file(tmp_path / "x.safetensors")["x"]
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:-4])
    assert tensor.read(slice(0, 2)).shape == (2, 8, 5)
    with pytest.raises(UserError, match=r"x.safetensors: ends at \d+, while it is read"):
        tensor.read()
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        tensor.read()


@pytest.mark.parametrize("shape", [(1, 8), (1, 3), (2, 4)])
def test_each_shard_of_a_mesh_reads_its_own_rows(
    shape: tuple[int, int], save_tiny: Any, reads: list[tuple[str, int, int]]
) -> None:
    source, _ = save_tiny("scaled_bias", torch.bfloat16, max_shard_size="100KB")
    imported = import_hf(source)
    specs, mesh = param_specs(imported.model), tiny.mesh(*shape)
    reads.clear()
    placed = place_params(imported.params, specs, mesh, "bfloat16")
    stored_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(imported.params))
    # No byte is read for one shard and left to another; a row is whole, and so is what is not divisible.
    assert len(reads) == len(set(reads))
    assert sum(num_bytes for _, _, num_bytes in reads) == stored_bytes
    rows = imported.params["embedding"]
    share = -(-rows.shape[0] // num_shards(mesh)) * rows.shape[1] * rows.dtype.itemsize
    assert max(num_bytes for _, _, num_bytes in reads) <= share
    check_placed(placed, imported.params, specs, num_shards(mesh))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0])
def test_shards_are_read_from_a_gguf_file_and_put_in_our_order(kind: Kind, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    write_gguf(tmp_path / "x.gguf", tiny_model("tied_gqa"), kind, tokenizer)
    imported = import_gguf(tmp_path / "x.gguf")
    specs = param_specs(imported.model)
    for shards in (3, 8):  # neither cuts the 48 rows of the keys between heads of 24
        placed = place_params(imported.params, specs, tiny.mesh(1, shards), "float32")
        check_placed(placed, jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), imported.params), specs, shards)


def check_placed(placed: Any, params: Any, specs: Any, shards: int) -> None:
    def compare(ours: jax.Array, theirs: jax.Array) -> None:
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), strict=True)

    jax.tree.map(compare, placed, pad_params(jax.tree.map(np.asarray, params), specs, shards))
