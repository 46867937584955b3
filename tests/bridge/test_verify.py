"""`verify` on Hugging Face directories and GGUF files: each kind of damage is found, named and placed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from launch.__main__ import build_app
from tests.bridge.fuzzing import made_gguf, made_hf
from tlite_jax.bridge.stored import StoredTensor
from tlite_jax.bridge.verify import verify_gguf, verify_hf

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("originals")
    made_hf(directory / "hf", max_shard_bytes=30_000)
    made_gguf(directory / "gguf")
    return directory


@pytest.fixture
def hf(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "hf", tmp_path / "hf"))


@pytest.fixture
def gguf(originals: Path, tmp_path: Path) -> Path:
    shutil.copytree(originals / "gguf", tmp_path / "gguf")
    return next((tmp_path / "gguf").glob("*.gguf"))


def problems(path: Path, verify: Callable[..., Any] = verify_hf, *, hashes: bool = False) -> list[str]:
    """What is wrong, without what the hashes say unless asked for."""
    return [str(damage) for damage in verify(path).damages if hashes or "SHA-256 is" not in str(damage)]


def test_what_export_wrote_is_intact(hf: Path, gguf: Path) -> None:
    seen = []
    found = verify_hf(hf, lambda what, done, total: seen.append((done, total)))
    assert (found.damages, found.unchecked) == ((), ())
    assert found.files == len(list(hf.iterdir()))
    assert found.checked.endswith("SHA-256 of every file in SHA256SUMS")
    sums = (hf / "SHA256SUMS").stat().st_size
    assert seen[-1] == (found.bytes - sums, found.bytes)
    for path in (gguf, gguf.parent):
        found = verify_gguf(path)
        assert found.damages == ()
        assert found.checked.endswith(f"SHA-256 in {gguf.name}.sha256")


def test_the_command_ends_with_one_when_something_is_damaged(hf: Path, gguf: Path) -> None:
    app = build_app()
    for path in (hf, gguf):
        ran = CliRunner().invoke(app, ["verify", str(path)])
        assert ran.exit_code == 0
        assert "intact" in ran.output
    content = bytearray(gguf.read_bytes())
    content[-40] ^= 1
    gguf.write_bytes(content)
    ran = CliRunner().invoke(app, ["verify", str(gguf), "--json"])
    assert ran.exit_code == 1
    values = json.loads(ran.output)
    assert [damage["file"] for damage in values["damages"]] == [gguf.name]
    assert "SHA-256 is" in values["damages"][0]["problem"]


def test_any_flipped_byte_is_found_by_its_hash(hf: Path) -> None:
    for path in sorted(hf.iterdir()):
        content = path.read_bytes()
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 0x10
        path.write_bytes(changed)
        assert any(damage.file == path.name or path.name == "SHA256SUMS" for damage in verify_hf(hf).damages), path.name
        path.write_bytes(content)


def test_a_truncated_shard_is_placed(hf: Path) -> None:
    shard = sorted(hf.glob("*.safetensors"))[0]
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-10])
    (line,) = problems(hf)
    assert line.startswith(f"{shard.name}: bytes {size - 10}..{size}: truncated, fetch it again: model.")
    (shard).write_bytes(shard.read_bytes() + bytes(13))
    assert problems(hf) == [f"{shard.name}: bytes {size}..{size + 3}: 3 bytes after the last tensor belong to none"]


def change(hf: Path, edit: Callable[[dict[str, np.ndarray]], None], shard: int = 0) -> Path:
    path = sorted(hf.glob("*.safetensors"))[shard]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return path


def test_tensors_are_compared_with_the_config_and_the_index(hf: Path) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1]
        tensors["spare"] = np.ones(3, np.float32)

    shard = change(hf, edit)
    rows, columns = json.loads((hf / "config.json").read_text())["vocab_size"], 32
    lines = problems(hf)
    assert f"{INDEX}: spare in {shard.name} is not listed" in lines
    assert "weights: extra: spare" in lines
    assert (
        f"weights: wrong shape: model.embed_tokens.weight is [{rows - 1}, {columns}] instead of [{rows}, {columns}]"
        in lines
    )
    assert len(lines) == 3


def test_a_shard_that_is_missing_is_named(hf: Path) -> None:
    shard = sorted(hf.glob("*.safetensors"))[1]
    shard.unlink()
    lines = problems(hf)
    assert lines[0] == f"{shard.name}: {INDEX}: '{shard.name}' is missing in {hf}"
    assert lines[-1] == f"{shard.name}: missing; it was written, says SHA256SUMS"


def test_values_that_are_no_numbers_are_counted(hf: Path) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        name = min(tensors)
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[:3] = [np.nan, np.inf, -np.inf]

    shard = change(hf, edit, shard=1)
    assert problems(hf) == [f"weights: {min(load_file(shard))} has 1 NaN and 2 infinite values"]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_values_are_counted_in_every_dtype(dtype: Any, tmp_path: Path) -> None:
    from tlite_jax.bridge.verify import _not_finite

    array = np.zeros((5, 7), dtype)
    array[1, 2], array[3, 3], array[4] = np.nan, -np.inf, np.nan
    stored = StoredTensor(array.shape, array.dtype.name, lambda rows: array[rows])
    assert _not_finite(stored) == (8, 1)
    whole = np.full((3, 4), -1, np.int64)
    stored = StoredTensor(whole.shape, "int64", lambda rows: whole[rows])
    assert _not_finite(stored) == (0, 0)


def test_the_tokenizer_must_belong_to_the_model(hf: Path) -> None:
    values = json.loads((hf / "tokenizer.json").read_text())
    values["model"]["vocab"]["far"] = 5000
    (hf / "tokenizer.json").write_text(json.dumps(values))
    (line,) = problems(hf)
    assert "the tokenizer's ids reach 5000" in line
    (hf / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in problems(hf)[0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{", "config.json: not JSON"),
        ("config.json", '{"model_type": "qwen2"}', "config.json: qwen2 is not supported"),
        (INDEX, '{"weight_map": {"a": "../hf/x.safetensors"}}', "is not a bare file name"),
        (INDEX, '{"weight_map": {"a": "/etc/passwd"}}', "is not a bare file name"),
        (INDEX, '{"weight_map": 3}', "'weight_map' must map"),
    ],
)
def test_damaged_json_is_named(hf: Path, name: str, content: str, words: str) -> None:
    (hf / name).write_text(content)
    assert any(words in line for line in problems(hf)), problems(hf)


def test_a_link_out_of_the_directory_is_not_followed(hf: Path, tmp_path: Path) -> None:
    shard = sorted(hf.glob("*.safetensors"))[0]
    shutil.move(shard, tmp_path / "outside")
    shard.symlink_to(tmp_path / "outside")
    assert "is a link out of" in problems(hf)[0]


def test_gguf_damages_are_placed(gguf: Path) -> None:
    content, size = gguf.read_bytes(), gguf.stat().st_size
    gguf.write_bytes(content[:-100])
    assert problems(gguf, verify_gguf) == [
        f"{gguf.name}: bytes {size - 100}..{size}: truncated, fetch it again: blk.1.ffn_up.weight end beyond the file"
    ]
    gguf.write_bytes(content[:-5000])
    (line,) = problems(gguf, verify_gguf)
    assert f"bytes {size - 5000}..{size}: truncated, fetch it again: blk.1." in line
    assert " more end beyond the file" in line
    gguf.write_bytes(content + bytes(5))
    assert problems(gguf, verify_gguf) == [
        f"{gguf.name}: bytes {size}..{size + 5}: 5 bytes after the last tensor belong to none"
    ]
    gguf.write_bytes(content[:3000])
    assert "its header leaves the file" in problems(gguf, verify_gguf)[0]
    name = b"blk.0.attn_k.weight"
    gguf.write_bytes(content.replace(name, b"blk.7.attn_k.weight"))
    lines = problems(gguf, verify_gguf)
    assert f"{gguf.name}: missing: blk.0.attn_k.weight" in lines
    assert f"{gguf.name}: extra: blk.7.attn_k.weight" in lines


def test_a_quantised_block_with_a_nan_scale_is_found(gguf: Path) -> None:
    content = bytearray(gguf.read_bytes())
    content[-34 * 32 : -34 * 32 + 2] = np.float16(np.nan).tobytes()  # a block of Q8_0 is a scale and 32 bytes
    gguf.write_bytes(content)
    assert problems(gguf, verify_gguf) == [f"{gguf.name}: blk.1.ffn_up.weight has 32 NaN and 0 infinite values"]


def test_without_a_hash_the_outcome_says_so(gguf: Path) -> None:
    gguf.with_name(f"{gguf.name}.sha256").unlink()
    assert f"no hash: {gguf.name}.sha256 is not there" in verify_gguf(gguf).checked


@pytest.mark.parametrize("text", ["nonsense", f"{'0' * 64}  ../x", f"{'0' * 64}  other.gguf"])
def test_a_checksum_file_that_is_none_is_named(gguf: Path, text: str) -> None:
    gguf.with_name(f"{gguf.name}.sha256").write_text(text)
    (damage,) = verify_gguf(gguf).damages
    assert damage.file == f"{gguf.name}.sha256"
