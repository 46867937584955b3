"""Files that name other files, or more than there can be: refused in a line, and nothing elsewhere is read."""

import json
import os
import struct
from pathlib import Path

import pytest

from tlite_jax.bridge.files import contained
from tlite_jax.bridge.gguf import import_gguf
from tlite_jax.bridge.hf import import_hf
from tlite_jax.bridge.verify import verify_gguf, verify_hf
from tlite_jax.errors import UserError
from tlite_jax.release.files import find_exports

_THETA = b"llama.rope.freq_base"


def damages(path: Path) -> str:
    """What verify says."""
    return "\n".join(map(str, (verify_gguf(path) if path.suffix == ".gguf" else verify_hf(path)).damages))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b'{"a": [' + b"[]," * 4_000_000 + b"[]]}", "objects and arrays; more than 4000000"),
        ("tokenizer.json", b'{"a": ' * 10**5 + b"1" + b"}" * 10**5, "not JSON"),
        ("tokenizer_config.json", b'{"bos_token": "\\ud800"}', "not JSON"),
        ("tokenizer_config.json", b'{"a": "' + b"x" * (17 << 20) + b'"}', "such a file has at most"),
    ],
)
def test_settings_that_fill_memory_or_are_no_text(hf: Path, name: str, content: bytes, words: str) -> None:
    (hf / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        import_hf(hf)
    assert words in damages(hf)


def test_whole_characters_may_be_escaped(hf: Path) -> None:
    (hf / "tokenizer_config.json").write_text('{"bos_token": "\\ud83d\\ude00"}')
    assert json.loads(import_hf(hf).tokenizer["tokenizer_config.json"])["bos_token"] == "\U0001f600"


def test_paths_in_a_tokenizers_settings_are_not_followed(hf: Path) -> None:
    values = json.loads((hf / "tokenizer_config.json").read_text())
    (hf / "tokenizer_config.json").write_text(json.dumps({**values, "tokenizer_file": "../secret", "vocab_file": "/x"}))
    kept = json.loads(import_hf(hf).tokenizer["tokenizer_config.json"])
    assert not [name for name in kept if name.endswith("_file")]
    assert "names files by path: tokenizer_file, vocab_file" in damages(hf)
    with pytest.raises(UserError, match="names files by path"):
        find_exports([hf])


def test_what_makes_others_load_something_else_is_named(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (hf / "one").symlink_to("two")
    (hf / "two").symlink_to(tmp_path / "secret")
    (hf / "adapter_config.json").write_text("{}")
    os.mkfifo(hf / "pipe")
    found = damages(hf)
    for words in ("one: 'one' is a link out of", "adapter_config.json: an adapter", "pipe: is neither a file nor"):
        assert words in found
    with pytest.raises(UserError, match="--exports"):
        find_exports([hf])


def test_links_among_exports_lead_nowhere_else(hf: Path, gguf: Path, tmp_path: Path) -> None:
    exports = tmp_path / "exports"
    exports.mkdir()
    (exports / "hf").symlink_to(hf)
    with pytest.raises(UserError, match="is a link out of"):
        find_exports([exports])
    (exports / "hf").unlink()
    (exports / "x.gguf").symlink_to(gguf)
    with pytest.raises(UserError, match="is a link out of"):
        find_exports([exports])


def test_a_checksum_file_is_not_read_elsewhere(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("root:x:0:0\n")
    sums = gguf.with_name(gguf.name + ".sha256")
    sums.unlink()
    sums.symlink_to(tmp_path / "secret")
    assert "is a link out of" in damages(gguf)
    assert "root:x" not in damages(gguf)


def test_a_directory_of_pipes_is_not_intact(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    assert "x.gguf" in str(verify_gguf(tmp_path).damages[0])


def test_a_folder_of_a_snapshot_leads_into_its_cache(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "1" / "gguf"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "b").write_text("")
    (folder / "x").symlink_to(tmp_path / "blobs" / "b")
    assert contained(folder, "x", "x") == folder / "x"
    (folder / "y").symlink_to(tmp_path)
    (tmp_path / "other").write_text("")
    (folder / "z").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="is a link out of"):
        contained(folder, "z", "z")


@pytest.mark.parametrize(
    "value",
    [struct.pack("<If", 6, 0.0), struct.pack("<If", 6, float("inf")), struct.pack("<I", 5), b"string"],
)
def test_theta_that_is_no_number(gguf: Path, value: bytes) -> None:
    content = gguf.read_bytes()
    at = content.index(_THETA) + len(_THETA)
    if value == b"string":
        changed = content[:at] + struct.pack("<IQ", 8, 4) + b"evil" + content[at + 8 :]
    else:
        changed = content[:at] + value + content[at + len(value) :]
    gguf.write_bytes(changed)
    with pytest.raises(UserError, match=r"rope\.freq_base is"):
        import_gguf(gguf)
    assert "rope.freq_base is" in damages(gguf)


def test_rows_of_any_length_are_not_read(gguf: Path) -> None:
    entry = struct.pack("<Q1sI2QIQ", 1, b"t", 2, 1 << 32, 1, 0, 0)
    gguf.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + entry)
    os.truncate(gguf, 1 << 35)
    with pytest.raises(UserError, match="has rows of 4294967296 values"):
        import_gguf(gguf)
    assert "has rows of 4294967296 values" in damages(gguf)


def test_errors_name_little_of_a_long_name(gguf: Path) -> None:
    size = 1 << 20
    entry = struct.pack("<Q", size) + b"n" * size + struct.pack("<IQIQ", 1, 32, 999, 0)
    gguf.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + entry)
    with pytest.raises(UserError, match="has type 999") as error:
        import_gguf(gguf)
    assert len(str(error.value)) < 1000


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 1234\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_what_git_left_in_place_of_a_large_file_is_named(hf: Path, gguf: Path, name: str) -> None:
    (hf / name).write_bytes(_POINTER)
    with pytest.raises(UserError, match=f"{name}: a Git LFS pointer.*git lfs pull"):
        import_hf(hf)
    gguf.write_bytes(_POINTER)
    with pytest.raises(UserError, match=r"gguf: a Git LFS pointer.*git lfs pull"):
        import_gguf(gguf)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("checkpoints", "a run, not a Hugging Face directory"),
        ("_CHECKPOINT_METADATA", "a checkpoint, not a Hugging Face directory"),
        ("adapter_config.json", "an adapter without the model"),
        ("params.json", "Meta's own format"),
        ("x", "'config.json' is missing"),
    ],
)
def test_what_is_no_hugging_face_directory_is_called_what_it_is(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=words):
        import_hf(tmp_path)


def test_a_part_of_the_weights_asks_for_its_index(hf: Path) -> None:
    (hf / "model.safetensors").rename(hf / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is a part .* the index is missing"):
        import_hf(hf)


def test_an_adapter_beside_the_weights_is_left_out_with_a_note(hf: Path) -> None:
    (hf / "adapter_config.json").write_text("{}")
    assert any("left out the adapter (adapter_config.json)" in note for note in import_hf(hf).notes)
