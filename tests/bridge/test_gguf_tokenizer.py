"""Tokenizers built from GGUF metadata give the ids of the tokenizer that the metadata came from.

The reference is a textbook BPE over llama.cpp's published regular expressions, not the library that ours uses.
"""

import functools
import itertools
import json
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.bridge.gguf_writing import tokenizer_metadata
from tests.bridge.tiny import SPECIAL, TEXTS, train_tokenizer
from tlite_jax.bridge.tokenizer import tokenizer_from_gguf
from tlite_jax.errors import UserError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# llama.cpp: llama-vocab.cpp, llm_tokenizer_bpe
REGEXES = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
BYTES = bytes_to_unicode()


def pieces(text: str, pre: str) -> list[str]:
    """Splits by each expression in turn; what lies between matches stays a piece."""
    parts = [text]
    for pattern in REGEXES[pre]:
        parts = [piece for part in parts for piece in regex.split(f"({pattern})", part) if piece]
    return parts


def reference_ids(text: str, metadata: dict[str, Any]) -> list[int]:
    """Splits off special tokens, then merges the best-ranked pair of a piece until none is left."""
    ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    pre, result = metadata["tokenizer.ggml.pre"], []
    for part in regex.split("(" + "|".join(map(regex.escape, SPECIAL)) + ")", text):
        if part in SPECIAL:
            result.append(ids[part])
            continue
        for piece in pieces(part, pre):
            symbols = [BYTES[byte] for byte in piece.encode()]
            if pre == "llama-bpe" and "".join(symbols) in ids:
                symbols = ["".join(symbols)]
            while len(symbols) > 1:
                pairs = list(itertools.pairwise(symbols))
                best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
                if best not in ranks:
                    break
                at = pairs.index(best)
                symbols[at : at + 2] = ["".join(best)]
            result += [ids[symbol] for symbol in symbols]
    return result


@functools.cache
def metadata_of(pre: str) -> dict[str, Any]:
    """GGUF metadata whose merges run across words, digits and signs, so that every split shows, and an orphan token."""
    trained = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    metadata = tokenizer_metadata(trained, pre)
    orphan = "".join(BYTES[byte] for byte in " подъезда".encode())
    assert orphan not in metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], orphan]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    return metadata


@functools.cache
def built(pre: str) -> Tokenizer:
    return Tokenizer.from_buffer(tokenizer_from_gguf(metadata_of(pre), "x.gguf")["tokenizer.json"])


@pytest.mark.parametrize("pre", REGEXES)
@pytest.mark.parametrize("text", [*TEXTS, "\n".join(TEXTS)])
def test_ids_equal_the_reference(pre: str, text: str) -> None:
    encoded = built(pre).encode(text, add_special_tokens=False)
    assert encoded.ids == reference_ids(text, metadata_of(pre))
    assert built(pre).decode(encoded.ids, skip_special_tokens=False) == text


@settings(max_examples=150, deadline=None)
@given(
    pre=st.sampled_from(sorted(REGEXES)),
    text=st.lists(
        st.sampled_from([*" \n\t'.,!?0123456789²½abzАяЁё日", "'ll", "'RE", "\r\n", "  ", "😀", "<|end|>", " подъезда"])
        | st.characters(min_codepoint=32, max_codepoint=0x4FF),
        max_size=40,
    ).map("".join),
)
def test_ids_equal_the_reference_on_any_text(pre: str, text: str) -> None:
    assert built(pre).encode(text, add_special_tokens=False).ids == reference_ids(text, metadata_of(pre))


def test_the_pre_tokenizers_differ_where_they_should() -> None:
    tokens = {
        pre: [metadata_of(pre)["tokenizer.ggml.tokens"][index] for index in built(pre).encode(" 12345 подъезда").ids]
        for pre in REGEXES
    }
    assert tokens["smollm"][:6] == ["Ġ", "1", "2", "3", "4", "5"]
    assert tokens["gpt-2"][0] == "Ġ12345"
    assert tokens["llama-bpe"][0] == "Ġ"
    assert "".join(tokens["llama-bpe"][1:3]) == "123"  # no token reaches from the third digit to the fourth
    assert len(tokens["llama-bpe"][-1]) > 12  # a whole piece that no merge leads to
    assert len(tokens["gpt-2"][-1]) < 12


def test_bos_is_added_when_the_file_says_so_and_for_llama3_when_it_says_nothing() -> None:
    for pre, value, added in (
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ):
        metadata = {**metadata_of(pre), "tokenizer.ggml.add_bos_token": value}
        if value is None:
            del metadata["tokenizer.ggml.add_bos_token"]
        tokenizer = Tokenizer.from_buffer(tokenizer_from_gguf(metadata, "x.gguf")["tokenizer.json"])
        assert (tokenizer.encode("да").ids[0] == 1) is added
        assert tokenizer.encode("да", add_special_tokens=False).ids[0] != 1
        assert [i for i in tokenizer.encode("да", "нет").ids if i == 1] == [1, 1][: 2 * added]


def test_control_tokens_are_special_and_user_defined_ones_are_not() -> None:
    trained = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    trained.add_tokens([AddedToken("<tool> call", normalized=False)])
    trained.add_special_tokens([AddedToken("<|turn|>", normalized=False)])
    metadata = tokenizer_metadata(trained, "gpt-2")
    tokenizer = Tokenizer.from_buffer(tokenizer_from_gguf(metadata, "x.gguf")["tokenizer.json"])
    text = "да<tool> call<|turn|><|end|>"
    assert tokenizer.encode(text).ids == trained.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text).ids) == "да<tool> call"


@pytest.mark.parametrize("pre", REGEXES)
def test_offsets_cover_the_text(pre: str) -> None:
    text = "The quick brown fox doesn't jump"
    assert "".join(text[begin:end] for begin, end in built(pre).encode(text, add_special_tokens=False).offsets) == text


def test_settings_and_generation_ids() -> None:
    metadata = metadata_of("gpt-2") | {"tokenizer.ggml.eot_token_id": 5, "llama.context_length": 777}
    files = {name: json.loads(content) for name, content in tokenizer_from_gguf(metadata, "x.gguf").items()}
    settings_ = files["tokenizer_config.json"]
    assert (settings_["bos_token"], settings_["eos_token"], settings_["pad_token"]) == (
        "<|start|>",
        "<|end|>",
        "<|pad|>",
    )
    assert (settings_["model_max_length"], settings_["chat_template"][:6]) == (777, "{% for")
    generation = files["generation_config.json"]
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, [0, 5], 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is absent or not a list of strings"),
        ({"tokenizer.ggml.merges": [1, 2]}, "tokenizer.ggml.merges is absent or not a list of strings"),
        ({"tokenizer.ggml.merges": ["a"]}, "merge 'a' is not of two tokens"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "merge 'a b c' is not of two tokens"),
        ({"tokenizer.ggml.merges": ["q q"]}, "merge 'q q' has parts that are not tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "1 token types"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "bos token id 1000000 is not one of"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos token id 'x' is not one of"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.merges": []}, "1 tokens are listed twice"),
    ],
)
def test_refuses_contradictions(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        tokenizer_from_gguf(metadata_of("gpt-2") | changes, "x.gguf")
    assert words in str(error.value)
