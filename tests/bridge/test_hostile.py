"""What a stranger's file could do besides being damaged: make us read elsewhere, wait, or fill the memory."""

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch.import_ import import_model
from tests.bridge.tiny import edit_json
from tlite_jax.bridge import gguf_file, safetensors_io
from tlite_jax.bridge.gguf import import_gguf
from tlite_jax.bridge.hf import import_hf
from tlite_jax.bridge.tokenizer import load_tokenizer, tokenizer_from_gguf
from tlite_jax.bridge.verify import verify_gguf, verify_hf
from tlite_jax.errors import UserError


def refused(path: Path, words: str, seconds: float = 10) -> None:
    """In one short line, and soon; verify says so too."""
    started = time.monotonic()
    is_gguf = path.suffix == ".gguf"
    with pytest.raises(UserError) as error:
        _ = import_gguf(path) if is_gguf else import_hf(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 4000
    damages = [str(damage) for damage in (verify_gguf(path) if is_gguf else verify_hf(path)).damages]
    assert any(words in damage for damage in damages), damages
    assert time.monotonic() - started < seconds


def safetensors_header(path: Path, header: str) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())


def many_tensors(count: int, name: str) -> str:
    entry = '":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return "{" + ",".join(f'"{name}{number}{entry}' for number in range(count)) + "}"


@pytest.mark.parametrize(("count", "words"), [(1_000_000, "is refused"), (101_000, "lists 101000 tensors")])
def test_headers_of_very_many_tensors(hf: Path, count: int, words: str) -> None:
    safetensors_header(hf / "model.safetensors", many_tensors(count, ""))
    refused(hf, words, seconds=60)


def test_errors_name_few_of_many_tensors(hf: Path) -> None:
    safetensors_header(hf / "model.safetensors", many_tensors(5_000, "x" * 150))
    with pytest.raises(UserError, match="and 4980 more") as error:
        import_hf(hf)
    assert len(str(error.value)) < 8000


@pytest.mark.parametrize("layers", [10**9, (1 << 63) - 1])
def test_configs_of_very_many_layers(hf: Path, layers: int) -> None:
    edit_json(hf / "config.json", num_hidden_layers=layers)
    refused(hf, f"for the {layers} layers")


def test_metadata_of_very_many_layers(gguf: Path) -> None:
    content = gguf.read_bytes()
    key = b"llama.block_count" + struct.pack("<I", 4)
    gguf.write_bytes(content.replace(key + struct.pack("<I", 2), key + struct.pack("<I", (1 << 32) - 1)))
    refused(gguf, "for the 4294967295 layers")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "head_dim", "intermediate_size"])
def test_configs_of_very_large_dims(hf: Path, key: str) -> None:
    edit_json(hf / "config.json", **{key: 1 << 40})
    refused(hf, "instead of" if key != "vocab_size" else "1099511627776")


def test_a_million_gguf_tensors(gguf: Path) -> None:
    entry = struct.pack("<Q1sI1QIQ", 1, b"t", 1, 32, 0, 0)
    gguf.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1_000_000, 0) + entry * 1_000_000)
    refused(gguf, "announces 1000000 tensors; more than 100000 are refused")


def test_arrays_in_arrays(gguf: Path) -> None:
    nested = struct.pack("<IQ", 9, 1) * 100_000
    key = struct.pack("<Q1sI", 1, b"k", 9)
    gguf.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + nested)
    refused(gguf, "arrays of type 9 are not known")


def test_strings_of_many_gigabytes(gguf: Path) -> None:
    gguf.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 40))
    os.truncate(gguf, 1 << 41)  # the file is as long as it says, and empty
    refused(gguf, "its header leaves the file")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
def test_small_files_that_are_huge(hf: Path, name: str) -> None:
    (hf / name).write_bytes(b"{")
    os.truncate(hf / name, 1 << 40)
    refused(hf, "such a file has at most")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors", "tokenizer_config.json"])
def test_links_out_of_the_directory(hf: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (hf / name).rename(outside)
    (hf / name).symlink_to(outside)
    refused(hf, "is a link out of")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pipes_are_not_waited_for(hf: Path, name: str) -> None:
    (hf / name).unlink()
    os.mkfifo(hf / name)
    with pytest.raises(UserError):
        import_hf(hf)
    with pytest.raises(UserError):
        import_model(str(hf / name), hf.parent / "run")


@pytest.mark.parametrize(
    "content", ["[]", "3", '"x"', "{}", '{"model": {}}', '{"model": {"type": "BPE"}}', "\x00", "{" * 10**5]
)
def test_a_tokenizer_that_is_none(hf: Path, content: str) -> None:
    (hf / "tokenizer.json").write_text(content)
    refused(hf, "tokenizer.json")


def test_weights_of_another_dtype(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    save_file({name: tensor.astype(np.float64) for name, tensor in tensors.items()}, hf / "model.safetensors")
    refused(hf, "is float64; weights are")


def test_nan_weights_are_imported_and_reported(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, hf / "model.safetensors")
    assert np.isnan(import_hf(hf).params["final_norm"]).all()
    assert "model.norm.weight has 32 NaN and 0 infinite values" in str(verify_hf(hf).damages[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.pre": ["gpt-2"]},
        {"tokenizer.ggml.token_type": 7},
        {"tokenizer.ggml.token_type": ["x"]},
        {"tokenizer.ggml.merges": "a b"},
        {"tokenizer.ggml.tokens": [""] * 4},
        {"tokenizer.ggml.bos_token_id": True},
        {"tokenizer.ggml.eos_token_id": -1},
        {"tokenizer.ggml.model": ["gpt2"]},
    ],
)
def test_metadata_of_other_types(gguf: Path, changes: dict[str, Any]) -> None:
    metadata, _ = gguf_file.read(gguf)
    with pytest.raises(UserError) as error:
        tokenizer_from_gguf(metadata | changes, "x.gguf")
    assert "\n" not in str(error.value)


def test_metadata_that_is_odd_but_harmless(gguf: Path) -> None:
    metadata, _ = gguf_file.read(gguf)
    odd = {
        "tokenizer.chat_template": 3,
        "tokenizer.chat_templates": 3,
        "tokenizer.ggml.add_bos_token": "yes",
        "llama.context_length": "long",
    }
    files = tokenizer_from_gguf(metadata | odd, "x.gguf")
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])
    load_tokenizer(files["tokenizer.json"], "x")


def test_dims_whose_product_is_beyond_any_integer(tmp_path: Path) -> None:
    big = (1 << 63) - 1
    entry = {"dtype": "F32", "shape": [big] * 8, "data_offsets": [0, 0]}
    safetensors_header(tmp_path / "x.safetensors", json.dumps({"a": entry}))
    with pytest.raises(UserError, match="its shape"):
        safetensors_io.read_file(tmp_path / "x.safetensors")
    safetensors_header(tmp_path / "x.safetensors", json.dumps({"a": entry | {"shape": [big, 0, big]}}))
    assert safetensors_io.read_file(tmp_path / "x.safetensors")["a"].shape == (big, 0, big)
