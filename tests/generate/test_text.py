"""Text as it comes: whole characters, stops wherever tokens divide them."""

from collections.abc import Sequence

import pytest
import transformers

from tests import tiny
from tests.evaluate.tiny_language_model import language_model
from tlite_jax.errors import UserError
from tlite_jax.generate import Sampling, TextStream


def decode(tokens: Sequence[int]) -> str:
    """Tokens are bytes."""
    return bytes(tokens).decode("utf-8", errors="replace")


def shown(text: str, stops: Sequence[str] = (), size: int = 1) -> tuple[list[str], TextStream]:
    stream = TextStream(decode, stops)
    raw = text.encode()
    parts = [stream.feed(list(raw[first : first + size])) for first in range(0, len(raw), size)]
    return [*parts, stream.finish()], stream


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_characters_come_whole(size):
    text = "Река 🚣 замёрзла"
    parts, _ = shown(text, size=size)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_a_stop_is_found_across_tokens_and_never_shown(size):
    parts, stream = shown("Ответ: да.\n\nВопрос: нет. Ответ", ["Вопрос:", "\n\nВ", "никогда"], size)
    assert "".join(parts) == stream.text == "Ответ: да."
    assert stream.stopped


def test_what_only_begins_like_a_stop_is_shown_in_the_end():
    parts, stream = shown("один\n\nдва\n", ["\n\n\n", ""])
    assert "".join(parts) == "один\n\nдва\n"
    assert not stream.stopped
    assert parts[-1] == "\n"


def test_a_broken_character_at_the_end_is_shown():
    stream = TextStream(decode)
    assert stream.feed([0xD0]) == ""
    assert stream.finish() == "\ufffd"


@pytest.fixture(scope="module")
def model():
    return language_model()


def test_written_text_streams_and_ends(model):
    prompt = model.encode("Утром")
    pieces: list[str] = []
    (free,) = model.write([prompt], max_new_tokens=10, on_text=lambda _, new: pieces.append(new), steps=2)
    assert free.text == "".join(pieces) == model.decode(free.tokens)
    assert (len(free.tokens), free.ending) == (10, "length")
    stop = free.text[2:4]
    (stopped,) = model.write([prompt], max_new_tokens=10, stops=[stop], steps=4)
    assert (stopped.text, stopped.ending) == (free.text[: free.text.index(stop)], "stop")
    assert len(stopped.tokens) <= 10


def test_many_prompts_keep_their_order_and_draws(model):
    prompts = [model.encode("Утром")[:6], model.encode("Он"), model.encode("The river")[:7]]
    sampling = Sampling(temperature=1.0, seed=4)
    together = model.write(prompts, max_new_tokens=5, sampling=sampling)
    (alone,) = model.write(prompts[1:2], max_new_tokens=5, sampling=sampling, streams=[1])
    assert together[1] == alone
    assert len({written.tokens for written in together}) == 3


def test_long_prompts_are_cut_and_counted_or_refused(model):
    prompt = model.encode("Утром над рекой стоял туман, и лодка шла вдоль берега.")
    assert len(prompt) > 12
    with pytest.raises(UserError, match="exceed the model's context of 16"):
        model.write([prompt], max_new_tokens=4)
    cut, kept = model.write([prompt, prompt[-12:]], max_new_tokens=4, truncate=True)
    assert cut.tokens == kept.tokens
    assert model.num_truncated_prompts == 1
    with pytest.raises(UserError, match="leave no room"):
        model.write([prompt], max_new_tokens=16, truncate=True)


def test_a_special_token_stops_by_its_id(model):
    assert isinstance(model.tokenizer, transformers.PreTrainedTokenizerFast)
    assert model._special_ids(["<|begin|>", "река"]) == {"<|begin|>": tiny_begin()}


def tiny_begin() -> int:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.data() / "tokenizer")
    return tokenizer.bos_token_id
