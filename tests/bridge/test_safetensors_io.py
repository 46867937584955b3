"""Safetensors: headers that lie, indexes that lead elsewhere, and what we write, read by the library."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tlite_jax.bridge import checksums
from tlite_jax.bridge.files import new_directory
from tlite_jax.bridge.safetensors_io import (
    INDEX_NAME,
    OutgoingTensor,
    parse_size,
    read_directory,
    read_file,
    write_directory,
)
from tlite_jax.errors import UserError


def write_raw(path: Path, header: Any, data: bytes = b"", header_bytes: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if header_bytes is None else header_bytes).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def outgoing(arrays: dict[str, np.ndarray]) -> list[OutgoingTensor]:
    return [
        OutgoingTensor(name, array.shape, array.dtype, lambda rows, a=array: a[rows]) for name, array in arrays.items()
    ]


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"{", b"", "not JSON"),
        (b"[]", b"", "expected a JSON object"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a":{"dtype":"F32","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,4]}}', b"", "not JSON"),
        (b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4), "given twice: a"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b' begins at 4, not at 8: overlap"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), "'b' begins at 8, not at 4: a hole"),
        ({"a": entry(4, 8)}, bytes(8), "a hole"),
        ({"a": entry(0, 8)}, bytes(4), "truncated"),
        ({"a": entry(0, 4)}, bytes(8), "4 bytes after the last tensor"),
        ({"a": entry(0, 8, [3])}, bytes(8), "'a' has 8 bytes"),
        ({"a": entry(0, 8, [-2, -1])}, bytes(8), "lacks a proper shape"),
        ({"a": entry(0, 8, [1] * 100)}, bytes(8), "lacks a proper shape"),
        ({"a": entry(0, 4, [True])}, bytes(4), "lacks a proper shape"),
        ({"a": entry(8, 0, [2])}, bytes(8), "'a' has -8 bytes"),
        ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "data_offsets"),
        ({"a": 3}, b"", "lacks a proper shape"),
        ({"a": entry(0, 4, [1], "Q9")}, bytes(4), "dtype 'Q9'; known: F64"),
        ({"a": entry(0, 4, [1], ["F32"])}, bytes(4), "dtype ['F32']"),
    ],
)
def test_refuses_headers_that_lie(tmp_path: Path, header: Any, data: bytes, words: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(UserError) as error:
        read_file(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0", b"\xff" * 8, b"\xff" * 100])
def test_refuses_truncated_and_foreign_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="truncated or not safetensors"):
        read_file(tmp_path / "x.safetensors")


def test_refuses_a_huge_header_without_reading_it(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", b"", header_bytes=1 << 40)
    os.truncate(path, 2 << 40)  # sparse: it fits the file, not the memory
    with pytest.raises(UserError, match="header of 1099511627776 bytes"):
        read_file(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.float16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        tensors = read_file(path)
    except UserError:
        return
    for tensor in tensors.values():
        assert tensor.read().shape == tensor.shape


@pytest.mark.parametrize("max_bytes", [10**9, 300])
def test_the_library_reads_what_we_write(tmp_path: Path, max_bytes: int) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "half": random.normal(size=(3, 5)).astype(np.float16),
        "brain": random.normal(size=(7, 11)).astype(ml_dtypes.bfloat16),
        "single": random.normal(size=(4, 4, 2)).astype(np.float32),
        "большой": random.normal(size=(20, 20)).astype(np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    seen = []
    write_directory(tmp_path, outgoing(arrays), max_bytes, lambda done, total: seen.append((done, total)))
    assert len(seen) == 4  # the empty one has no rows
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total := sum(array.nbytes for array in arrays.values()), total)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 or max_bytes == 300
    for file in files:
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118  not a dictionary
                tensor = opened.get_tensor(name)
                assert tuple(tensor.shape) == arrays[name].shape
                assert bytes(tensor.reshape(-1).view(dtype=torch.uint8).numpy()) == arrays[name].tobytes()
    ours = read_directory(tmp_path)
    assert ours.keys() == arrays.keys()
    for name, array in arrays.items():
        read = ours[name].read()
        assert read.dtype == array.dtype
        assert read.tobytes() == array.tobytes()
    if max_bytes == 300:
        index = json.loads((tmp_path / INDEX_NAME).read_text())
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
        assert index["weight_map"].keys() == arrays.keys()
        for file in files:
            shard = [array.nbytes for name, array in arrays.items() if index["weight_map"][name] == file.name]
            assert sum(shard) <= 300 or len(shard) == 1


@pytest.fixture
def sharded(tmp_path: Path) -> Callable[[str], Path]:
    """A directory whose index gives the second shard the given name."""

    def make(name: str) -> Path:
        directory = tmp_path / "model"
        directory.mkdir()
        save_file({"a": np.ones(3, np.float32)}, directory / "one.safetensors")
        save_file({"b": np.ones(3, np.float32)}, tmp_path / "outside.safetensors")
        save_file({"b": np.ones(3, np.float32)}, directory / "two.safetensors")
        weight_map = {"a": "one.safetensors", "b": name}
        (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        return directory

    return make


def test_reads_a_sharded_directory(sharded: Callable[[str], Path]) -> None:
    assert read_directory(sharded("two.safetensors")).keys() == {"a", "b"}


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "{tmp}/outside.safetensors", "sub/../two.safetensors", "..", "", "two.safetensors\0"],
)
def test_an_index_cannot_lead_elsewhere(sharded: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="not a bare file name"):
        read_directory(sharded(name.format(tmp=tmp_path)))


def test_an_index_must_name_files_that_are_there(sharded: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"'three.safetensors' is missing"):
        read_directory(sharded("three.safetensors"))


def test_links_out_of_the_directory_are_refused(sharded: Callable[[str], Path]) -> None:
    directory = sharded("link.safetensors")
    (directory / "link.safetensors").symlink_to("../outside.safetensors")
    with pytest.raises(UserError, match="is a link out of"):
        read_directory(directory)
    (directory / "link.safetensors").unlink()
    (directory / "link.safetensors").symlink_to("two.safetensors")
    assert read_directory(directory).keys() == {"a", "b"}


def test_an_index_and_its_shards_must_agree(sharded: Callable[[str], Path]) -> None:
    directory = sharded("two.safetensors")
    save_file({"b": np.ones(3, np.float32), "c": np.ones(1, np.float32)}, directory / "two.safetensors")
    with pytest.raises(UserError, match=r"disagrees with two.safetensors about c"):
        read_directory(directory)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}])
def test_an_index_needs_a_weight_map(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="weight_map"):
        read_directory(tmp_path)


def test_a_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    destination = tmp_path / "deep" / "model"

    def interrupted() -> None:
        with new_directory(destination) as directory:
            (directory / "half").write_text("x")
            assert not destination.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_directory_appears_whole_and_only_where_nothing_is(tmp_path: Path) -> None:
    destination = tmp_path / "model"
    destination.mkdir()
    with new_directory(destination) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text("x")
    assert (destination / "sub" / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [destination]
    for occupied in (destination, destination / "sub" / "file"):
        with pytest.raises(UserError, match="exists"), new_directory(occupied):
            raise AssertionError("must not be entered")
    with pytest.raises(UserError, match="cannot write"), new_directory(destination / "sub" / "file" / "deeper"):
        raise AssertionError("must not be entered")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2 << 30), ("300", 300), ("7kib", 7168)]
)
def test_reads_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 apples", "nan", "1e9"])
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="not a size"):
        parse_size(text)


def test_a_hashed_file_is_brought_to_the_disk_meanwhile_and_leaves_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_FLUSHED", 1000)
    monkeypatch.setattr(checksums, "_CHUNK", 400)
    done: list[str] = []
    monkeypatch.setattr(checksums.os, "fdatasync", lambda file: done.append("disk"))
    monkeypatch.setattr(checksums.os, "posix_fadvise", lambda *rest: done.append("cache"))
    content = np.random.default_rng(0).bytes(2900)
    with checksums.HashedFile(tmp_path / "x") as file:
        file.write(content[:1700])
        file.write(np.frombuffer(content[1700:], np.uint8).reshape(2, -1))
    assert (tmp_path / "x").read_bytes() == content
    assert file.hexdigest() == hashlib.sha256(content).hexdigest()
    assert done == ["disk", "cache"] * 2


def test_a_hashed_file_that_the_disk_does_not_take_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums, "_FLUSHED", 1000)
    monkeypatch.setattr(checksums.os, "fdatasync", refuse)
    with pytest.raises(OSError, match="No space left"), checksums.HashedFile(tmp_path / "x") as file:
        file.write(bytes(1000))
