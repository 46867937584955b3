"""Requests of lm-evaluation-harness against its own HFLM on the same weights."""

import jax
import numpy as np
import pytest
import transformers
from helpers import hf_model, params_from_hf

from tests import tiny
from tests.evaluate import harness_requests as make
from tlite_jax.config import MeshConfig, ModelConfig
from tlite_jax.errors import UserError
from tlite_jax.evaluate.language_model import LanguageModel
from tlite_jax.model.decoder import param_specs
from tlite_jax.sharding import make_mesh, place_params

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is 200 MB: make test-eval installs it")
pytest.importorskip("accelerate", reason="HFLM needs it: make test-eval installs it")

from tlite_jax.evaluate.harness import HarnessModel, generation_options
from tlite_jax.evaluate.scoring import NonFiniteError
from tlite_jax.generate import GREEDY, Sampling

LENGTH = 40
MODEL = ModelConfig(**{**tiny.MODEL, "max_position_embeddings": LENGTH, "tie_word_embeddings": False})


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(tiny.data() / "tokenizer")


@pytest.fixture(scope="module")
def reference_model(tokenizer):
    model = hf_model(MODEL, seed=4)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.fixture(scope="module")
def reference(reference_model, tokenizer):
    return make.hugging_face(reference_model, tokenizer, max_length=LENGTH)


def ours(reference_model, tokenizer, devices: int) -> HarnessModel:
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    params = place_params(params_from_hf(reference_model, MODEL), param_specs(MODEL), mesh)
    return HarnessModel(LanguageModel(params, MODEL, mesh, tokenizer))


@pytest.fixture(scope="module", params=[1, 8])
def found(request, reference_model, tokenizer):
    return ours(reference_model, tokenizer, request.param)


def test_loglikelihoods_equal_hflm(found, reference):
    asked = make.instances("loglikelihood", make.loglikelihood_requests(60, LENGTH))
    expected, answers = reference.loglikelihood(asked), found.loglikelihood(asked)
    tokens = [len(found.model.encode_pair(*instance.args)[1]) for instance in asked]
    for (logprob, greedy), (expected_logprob, expected_greedy), count in zip(answers, expected, tokens, strict=True):
        assert abs(logprob - expected_logprob) <= 1e-5 * count
        assert greedy == expected_greedy
    assert found.model.scorer.num_truncated > 0


def test_rolling_loglikelihoods_equal_hflm(found, reference):
    asked = make.instances("loglikelihood_rolling", make.rolling_requests(20, LENGTH))
    answers, expected = found.loglikelihood_rolling(asked), reference.loglikelihood_rolling(asked)
    np.testing.assert_allclose(answers, expected, rtol=1e-6)
    assert answers[0] == 0


def test_texts_equal_hflm(found, reference):
    asked = make.instances("generate_until", make.generation_requests(15, LENGTH, tokens=8))
    assert found.generate_until(asked) == reference.generate_until(asked)
    assert found.model.num_truncated_prompts > 0


def test_a_draw_follows_the_seed_and_repeats_differ(reference_model, tokenizer):
    first = ours(reference_model, tokenizer, 1)
    again = HarnessModel(first.model)
    options = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 6, "until": []}
    asked = make.instances("generate_until", [("Утром", options), ("Утром", options)])
    texts = first.generate_until(asked)
    assert texts[0] != texts[1]
    assert first.generate_until(asked) != texts
    assert again.generate_until(asked) == texts


def test_a_request_that_breaks_is_named(reference_model, tokenizer):
    found = ours(reference_model, tokenizer, 1)
    (number,) = tokenizer.encode("Q", add_special_tokens=False)
    embedding = found.model.params["embedding"]
    found.model.params = {**found.model.params, "embedding": embedding.at[number].set(np.nan)}
    asked = make.instances("loglikelihood", [("Утром", " над"), ("Утро Q", " рекой")])
    with pytest.raises(NonFiniteError, match=r"request 1: a log-probability is nan.*Утро Q"):
        found.loglikelihood(asked)
    with pytest.raises(UserError, match="no tokens to score: ''"):
        found.loglikelihood(make.instances("loglikelihood", [("Утром", "")]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ([], 256, GREEDY)),
        ({"until": "\n", "max_gen_toks": 5, "temperature": 0.0}, (["\n"], 5, GREEDY)),
        ({"until": ["a", "b"], "max_new_tokens": 7, "do_sample": False, "temperature": 0.7}, (["a", "b"], 7, GREEDY)),
        ({"temperature": 0.7}, ([], 256, Sampling(temperature=0.7, top_k=50))),
        (
            {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 8, "num_beams": 1},
            ([], 256, Sampling(temperature=0.5, top_k=3, top_p=0.9, seed=8)),
        ),
        ({"repetition_penalty": 1.2}, ([], 256, Sampling(repetition_penalty=1.2))),
    ],
)
def test_generation_options_mean_what_they_mean_to_hflm(options, expected):
    assert generation_options(options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"do_sample": True}, "temperature above 0"),
        ("x", "mapping"),
    ],
)
def test_options_that_we_do_not_have_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        generation_options(options)
