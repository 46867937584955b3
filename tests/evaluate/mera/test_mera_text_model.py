"""Whole texts scored as MERA 1.1.0 does, on a small random model."""

import jax
import numpy as np
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from tests import tiny
from tests.helpers import hf_model, params_from_hf, quick_jit
from tlite_jax.config import MeshConfig, ModelConfig
from tlite_jax.evaluate.language_model import LanguageModel
from tlite_jax.evaluate.mera.text_model import MeraModel
from tlite_jax.model.decoder import init_params, param_specs
from tlite_jax.sharding import make_mesh, place_params

MODEL = ModelConfig(**tiny.MODEL)
LONG = "Утром над рекой стоял туман, и лодка шла вдоль берега. " * 20


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(jax, "jit", quick_jit)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.tree.map(np.asarray, init_params(MODEL, seed=3))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.data() / "tokenizer")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    return LanguageModel(place_params(params, param_specs(MODEL), mesh), MODEL, mesh, tokenizer)


def plainly(model: LanguageModel, text: str) -> float:
    """Every token but the first, each request alone."""
    tokens = model.tokenizer.encode(text, add_special_tokens=False)[-MODEL.max_position_embeddings :]
    return model.score_tokens([(tokens[:1], tokens[1:])])[0].logprob


def test_whole_texts_are_scored(model):
    pairs = [
        (context, f" {choice}") for context in ("Да или нет?", "Ответ:", LONG) for choice in ("Да", "Нет", "берег")
    ]
    pairs += [("Ответ:", ""), ("", "Ответ")]
    told = []
    mera = MeraModel(model)
    scores = mera.score(pairs, lambda *line: told.append(line))
    np.testing.assert_allclose(scores, [plainly(model, "".join(pair)) for pair in pairs], rtol=1e-5)
    assert told[-1] == (len(pairs), len(pairs))
    assert mera.num_truncated == 3
    # No token of the tokenizer's own stands before a text: with one, the first token would be scored as well.
    special = model.tokenizer.encode("Ответ: Да")
    assert special[0] == model.prefix_id
    assert scores[3] != pytest.approx(model.score_tokens([(special[:1], special[1:])])[0].logprob, abs=0.1)


def test_a_texts_score_is_that_of_transformers(model):
    """All tokens but the first, float32 log-softmax, as the original's `_loglikelihood_tokens` sums them."""
    reference = hf_model(MODEL, seed=1)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = place_params(params_from_hf(reference, MODEL), param_specs(MODEL), mesh)
    pairs = [(context, f" {choice}") for context in ("Да или нет?", LONG) for choice in ("Да", "Нет")]
    scores = MeraModel(LanguageModel(params, MODEL, mesh, model.tokenizer)).score(pairs, lambda *_: None)
    for pair, score in zip(pairs, scores, strict=True):
        tokens = torch.tensor(model.tokenizer.encode("".join(pair), add_special_tokens=False)[-64:])
        with torch.no_grad():
            logprobs = torch.log_softmax(reference(tokens[None, :-1]).logits[0].float(), dim=-1)
        assert score == pytest.approx(float(logprobs.gather(1, tokens[1:, None]).double().sum()), rel=1e-5)


def test_what_choices_share_cannot_turn_their_order(model):
    """The difference of two choices is that of their last tokens, to the bit."""
    pairs = [(LONG[:55], f" {choice}") for choice in "12"]
    first, second = MeraModel(model).score(pairs, lambda *_: None)
    tokens = [model.tokenizer.encode("".join(pair), add_special_tokens=False) for pair in pairs]
    assert tokens[0][:-1] == tokens[1][:-1]
    assert 10 < len(tokens[0]) <= MODEL.max_position_embeddings
    alone = [scored.logprob for scored in model.score_tokens([(ids[:-1], ids[-1:]) for ids in tokens])]
    assert first - second == pytest.approx(alone[0] - alone[1], abs=1e-12)


def test_answers_end_at_a_stop_and_contexts_lose_their_beginning(model):
    mera, told = MeraModel(model), []
    contexts = ["Ответ:", LONG]
    texts = mera.generate(contexts, stops=(), max_tokens=12, seed=None, progress=lambda *line: told.append(line))
    for context, text in zip(contexts, texts, strict=True):
        tokens = model.tokenizer.encode(context, add_special_tokens=False)[-(MODEL.max_position_embeddings - 12) :]
        assert text == model.write([tokens], max_new_tokens=12)[0].text
    assert (mera.num_truncated, told) == (1, [(2, 2)])
    stop = texts[0][len(texts[0]) // 2]
    (stopped,) = mera.generate(contexts[:1], stops=(stop,), max_tokens=12, seed=None, progress=lambda *_: None)
    assert stopped == texts[0].split(stop)[0] != texts[0]


def test_samples_follow_their_seed_alone(model, monkeypatch):
    def sample(contexts, seed):
        return MeraModel(model).generate(contexts, stops=(), max_tokens=8, seed=seed, progress=lambda *_: None)

    contexts = ["Ответ:", "Да или нет?"]
    first = sample(contexts, 0)
    assert first != sample(contexts, 1)
    monkeypatch.setattr("tlite_jax.evaluate.mera.text_model._PROMPTS_AT_A_TIME", 1)
    assert sample(contexts, 0) == first
