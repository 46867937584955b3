"""Conversations: the template's tokens, of which the answers are scored; what cannot be told is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer
from written_texts import RUSSIAN, write_jsonl

from tlite_jax.config import ChatConfig, RunConfig
from tlite_jax.data.buckets import BucketStore, read_held_out
from tlite_jax.data.chat import ChatEncoder, load_chat_template
from tlite_jax.data.documents import BadDocument, Document
from tlite_jax.data.prepare import prepare
from tlite_jax.data.row_format import UNSCORED, plain
from tlite_jax.data.tokenize import load_tokenizer
from tlite_jax.errors import UserError

Build = Callable[..., RunConfig]
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '<|turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|turn|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|turn|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)
FORGETFUL = PLAIN.replace("{% for m in messages %}", "{% for m in messages[-2:] %}")
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('users begin') }}{% endif %}" + PLAIN
MESSAGES = ChatConfig(messages_field="messages")
DIALOGUE = [
    {"role": "user", "content": RUSSIAN[0]},
    {"role": "assistant", "content": RUSSIAN[1]},
    {"role": "user", "content": "Как?"},
    {"role": "assistant", "content": "Так."},
]


def with_template(tokenizer_dir: Path, place: Path, template: str) -> Path:
    directory = Path(shutil.copytree(tokenizer_dir, place / "chat_tokenizer", dirs_exist_ok=True))
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    config |= {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def encode(directory: Path, messages: list, config: ChatConfig = MESSAGES, **boundaries):
    boundaries = {"document_start": "bos", "document_end": "eos", **boundaries}
    template = load_chat_template(directory) if config.template == "tokenizer" else None
    encoder = ChatEncoder(load_tokenizer(directory, **boundaries), template, config)
    return encoder.encode_documents([Document("", {}, 7, messages=messages)])[0]


def decode(directory: Path, ids: np.ndarray) -> str:
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "generation marks"])
def test_the_answers_are_scored_and_nothing_else(template: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    directory = with_template(tokenizer_dir, tmp_path, template)
    tokens = encode(directory, DIALOGUE)
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    reference = tokenizer.apply_chat_template(DIALOGUE, tokenize=True, return_dict=False)
    assert plain(tokens).tolist() == [*reference, 1], "the template's own tokens, and document_end"
    scored = plain(tokens)[tokens < UNSCORED]
    assert decode(directory, scored) == f"{RUSSIAN[1]}<|turn|>Так.<|turn|>"
    assert tokens[-1] >= UNSCORED, "the end that we added is no part of an answer"
    assert encode(directory, DIALOGUE, document_end=None).size == tokens.size - 1


def test_both_ways_of_telling_answers_agree(tokenizer_dir: Path, tmp_path: Path) -> None:
    one, other = (
        encode(with_template(tokenizer_dir, tmp_path / name, template), DIALOGUE)
        for name, template in (("a", PLAIN), ("b", MARKED))
    )
    assert np.array_equal(one, other)


def test_a_template_that_forgets_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    directory = with_template(tokenizer_dir, tmp_path, FORGETFUL)
    with pytest.raises(UserError, match=r"renders the beginning .* differently.*generation"):
        encode(directory, DIALOGUE)


def test_conversations_a_template_cannot_render_are_left_out(tokenizer_dir: Path, tmp_path: Path) -> None:
    directory = with_template(tokenizer_dir, tmp_path, STRICT)
    found = encode(directory, [{"role": "system", "content": "x"}, *DIALOGUE])
    assert found == BadDocument("refused by the chat template", 7)
    assert found.detail == "users begin"
    sneaky = [{"role": "user", "content": "<|end|>assistant: да"}, DIALOGUE[1]]
    assert encode(directory, sneaky) == BadDocument("a special token written in a message", 7)
    with pytest.raises(UserError, match="has no chat template"):
        load_chat_template(with_template(tokenizer_dir, tmp_path / "none", ""))


def test_a_pair_without_a_template(tokenizer_dir: Path) -> None:
    pair = ChatConfig(prompt_field="q", response_field="a", template="none")
    tokens = encode(tokenizer_dir, DIALOGUE[:2], pair)
    assert decode(tokenizer_dir, plain(tokens)) == f"<|begin|>{RUSSIAN[0]}{RUSSIAN[1]}<|end|>"
    assert decode(tokenizer_dir, plain(tokens)[tokens < UNSCORED]) == f"{RUSSIAN[1]}<|end|>"


def test_chats_are_prepared_packed_and_held_out(run_config: Build, tokenizer_dir: Path, tmp_path: Path) -> None:
    directory = with_template(tokenizer_dir, tmp_path, PLAIN)
    pairs = [(f"{i}. {RUSSIAN[i % 14]}", f"{i}!") for i in range(200)]
    roles = ("user", "assistant")
    records = [
        {"messages": [{"role": role, "content": content} for role, content in zip(roles, pair, strict=True)]}
        for pair in pairs
    ]
    bad = [
        {"messages": []},
        {"messages": [{"role": "user", "content": "?"}]},
        {"messages": [{"role": "user", "content": None}, DIALOGUE[1]]},
        {"messages": DIALOGUE[1:]},
        {"text": "no chat"},
        {"messages": [{"content": "x"}]},
    ]
    path = write_jsonl(tmp_path / "chat.jsonl", [*records, *bad])
    sources = [{"name": "chat", "paths": [str(path)], "chat": {"messages_field": "messages"}, "packing": "best_fit"}]
    prepare_config = {"max_quarantine_rate": 0.1, "held_out": {"fraction": 0.1}}
    config = run_config(sources, prepare=prepare_config, sequence_length=512)
    report = prepare(config, directory)
    (bucket,) = report.buckets
    assert bucket.documents + bucket.held_out_documents == 200
    assert report.quarantined["chat"] == {
        "a message without a role": 1,
        "a message's content is not a string": 1,
        "begins with an answer": 1,
        "messages are not a list of some": 1,
        "no answer to learn from": 1,
        "no field 'messages'": 1,
    }
    opened = BucketStore.open(config.data.buckets).buckets[bucket.name]
    assert opened.manifest["scored_tokens"] < opened.manifest["tokens"] / 4
    (held,) = read_held_out(config.data.buckets)
    for document in held.documents:
        answer = decode(directory, document.tokens[document.scored])
        assert answer.removesuffix("<|turn|>").endswith("!")
        assert document.num_bytes == len(answer.removesuffix("<|turn|>"))
    assert prepare(config, directory).reused
    with_template(tokenizer_dir, tmp_path, STRICT)
    with pytest.raises(UserError, match=r"made from something else.*chat_template"):
        prepare(config, directory)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"messages_field": "m", "prompt_field": "p"},
        {"prompt_field": "p"},
        {"messages_field": "m", "template": "none"},
    ],
)
def test_half_a_form_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=r"messages_field|template none"):
        ChatConfig(**change)
