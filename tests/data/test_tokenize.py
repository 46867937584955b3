"""Tokens are the text's own: nothing added, cut, padded or smuggled in."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from written_texts import ENGLISH, RUSSIAN

from tlite_jax.data.tokenize import Encoder, check_vocabulary, load_tokenizer
from tlite_jax.errors import UserError


def encode(directory: Path, texts: list[str], start: str | None = "bos", end: str | None = "eos", parse: bool = False):
    return Encoder(load_tokenizer(directory, start, end), parse_special_tokens=parse).encode(texts)


def test_text_comes_back_whole_between_its_boundaries(tokenizer_dir: Path) -> None:
    texts = [" ".join(RUSSIAN), " ".join(ENGLISH), "ё"]
    decoder = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    for text, tokens in zip(texts, encode(tokenizer_dir, texts), strict=True):
        assert tokens.dtype == "uint32"
        assert (tokens[0], tokens[-1]) == (0, 1)
        assert decoder.decode(tokens[1:-1].tolist(), skip_special_tokens=False) == text
    (bare,) = encode(tokenizer_dir, texts[:1], None, None)
    assert decoder.decode(bare.tolist(), skip_special_tokens=False) == texts[0]
    (turn,) = encode(tokenizer_dir, ["x"], "<|turn|>", None)
    assert turn[0] == 2


def test_special_tokens_in_a_text_stay_text_unless_asked(tokenizer_dir: Path) -> None:
    text = "до<|end|>после"
    (plain,), (parsed,) = (
        encode(tokenizer_dir, [text], None, None),
        encode(tokenizer_dir, [text], None, None, parse=True),
    )
    assert 1 not in plain
    assert (parsed == 1).sum() == 1
    decoder = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    assert decoder.decode(plain.tolist(), skip_special_tokens=False) == text


def test_what_the_tokenizer_lacks_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tokenizer_dir / "tokenizer.json", bare)
    with pytest.raises(UserError, match=r"has no bos token: set data\.document_start to null"):
        load_tokenizer(bare, "bos", None)
    (bare / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    assert load_tokenizer(bare, None, "eos").document_end == 1
    with pytest.raises(UserError, match=r"has no token '<\|sep\|>': set data\.document_end"):
        load_tokenizer(bare, None, "<|sep|>")
    with pytest.raises(UserError, match="no tokenizer directory"):
        load_tokenizer(tmp_path / "none", None, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path / "empty", None, None)
    (bare / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="damaged tokenizer") as caught:
        load_tokenizer(bare, None, None)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_larger_than_the_models_is_refused(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir, "bos", "eos")
    check_vocabulary(tokenizer, tokenizer.num_ids)
    with pytest.raises(UserError, match=f"ids up to {tokenizer.num_ids - 1}.*vocab_size is {tokenizer.num_ids - 1}"):
        check_vocabulary(tokenizer, tokenizer.num_ids - 1)


def test_a_directory_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {character: i for i, character in enumerate(bytes_to_unicode().values())}
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "<|endoftext|>": 256}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    )
    assert issubclass(GPT2Tokenizer, object)
    (tokens,) = encode(tmp_path, ["ab"], None, "eos")
    assert tokens.tolist()[-1] == 256
    assert len(tokens) == 3
