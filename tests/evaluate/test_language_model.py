"""Text in, log-likelihoods out: how text is cut into tokens, and whole texts in windows."""

import numpy as np
import pytest

from tests.evaluate.tiny_language_model import language_model
from tlite_jax.evaluate.language_model import LanguageModel, rolling_windows

TEXT = "Утром над рекой стоял туман, и лодка шла вдоль берега."


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return language_model()


def test_spaces_go_to_the_continuation(model):
    spaced, plain = model.encode_pair("Утром  ", "над рекой"), model.encode_pair("Утром", "  над рекой")
    assert spaced == plain
    context, rest = plain
    assert context == model.encode("Утром")
    assert context + rest == model.encode("Утром  над рекой")


def test_an_empty_context_is_the_prefix_token(model):
    assert model.prefix_id == model.tokenizer.bos_token_id != model.end_id
    context, rest = model.encode_pair("", "река")
    assert (context, model.decode(rest)) == ([model.prefix_id], "река")
    # A text that brings the prefix itself does not get it twice.
    assert model.encode_pair("", "<|begin|>река") == (context, rest)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9, 15])
def test_windows_score_every_token_once(count):
    tokens = list(range(count))
    windows = rolling_windows(tokens, prefix=99, length=4)
    assert [token for _, rest in windows for token in rest] == tokens
    whole = [99, *tokens]
    for context, rest in windows:
        end = whole.index(rest[-1]) + 1
        assert whole[end - len(rest) - len(context) : end] == context + rest
        # The input, all but the last token, is as long as it may be.
        assert len(context) + len(rest) - 1 == min(4, end - 1)


@pytest.mark.parametrize("devices", [1, 8])
def test_whole_texts_are_summed_over_their_windows(model, devices):
    texts = [TEXT, "", TEXT[:9], TEXT + TEXT]
    found = (model if devices == 1 else language_model(devices)).score_texts(texts)
    expected = []
    for text in texts:
        windows = rolling_windows(model.encode(text), model.prefix_id, 16)
        expected.append(sum(model.score_tokens([window])[0].logprob for window in windows))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[1] == 0
    assert found[0] < -50


def test_pairs_of_text_are_scored_as_their_tokens(model):
    (scored,) = model.score([("Утром над", " рекой")])
    context, rest = model.encode_pair("Утром над", " рекой")
    assert len(scored.logprobs) == len(rest)
    assert scored.logprob == pytest.approx(model.score_tokens([(context, rest)])[0].logprob, abs=1e-6)
