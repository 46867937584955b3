"""Decoding against transformers' generate, on one device and on a mesh."""

import jax
import numpy as np
import pytest
import torch
from helpers import ROPE_SCALING, hf_model, params_from_hf, tiny_model

from tlite_jax.config import MeshConfig
from tlite_jax.errors import UserError
from tlite_jax.generate import Generator, Sampling
from tlite_jax.model.decoder import param_specs
from tlite_jax.sharding import make_mesh, place_params

CONFIGS = {
    "grouped": tiny_model(),
    "scaled, tied, biased": tiny_model(
        head_dim=16,
        rope_scaling=ROPE_SCALING,
        tie_word_embeddings=True,
        attention_bias=True,
        num_key_value_heads=1,
    ),
}
CONFIG = CONFIGS["grouped"]
PROMPTS = [[5, 17, 99], [3], [8, 8, 120, 44, 0, 61, 7], [130, 2, 2, 40]]


class Model:
    """A generator with random weights loaded."""

    def __init__(self, config, devices=1, replica=1, params=None, dtype="float32"):
        mesh = make_mesh(MeshConfig(replica=replica), jax.devices()[:devices])
        params = params_from_hf(hf_model(config), config) if params is None else params
        self.generator = Generator(config, mesh, dtype=dtype)
        self.loaded = self.generator.load(place_params(params, param_specs(config), mesh))

    def tokens(self, prompts=PROMPTS, *, new=12, steps=5, **options):
        decoding = self.generator.start(self.loaded, prompts, max_new_tokens=new, **options)
        while not decoding.done:
            decoding.advance(steps)
        return decoding.tokens


@pytest.fixture(scope="module")
def model():
    return Model(CONFIG)


def transformers_tokens(config, prompts, new, **options):
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = hf_model(config).generate(
        padded, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )
    return found[:, longest:].tolist()


@pytest.mark.parametrize(
    ("name", "devices", "replica"),
    [("grouped", 1, 1), ("scaled, tied, biased", 1, 1), ("scaled, tied, biased", 8, 2), ("grouped", 8, 1)],
)
def test_greedy_tokens_equal_transformers(name, devices, replica):
    config = CONFIGS[name]
    ours = Model(config, devices, replica).tokens(new=40, steps=7)
    assert ours == transformers_tokens(config, PROMPTS, 40)
    assert len({token for row in ours for token in row}) > 20, "a model that repeats itself tests little"


def test_a_repetition_penalty_counts_prompt_and_text(model):
    prompt = [PROMPTS[2]]
    free, ours = model.tokens(prompt, new=40), model.tokens(prompt, new=40, sampling=Sampling(repetition_penalty=1.3))
    assert ours == transformers_tokens(CONFIG, prompt, 40, repetition_penalty=1.3)
    assert ours != free


def test_a_prompt_is_continued_as_it_is_alone(model):
    assert model.tokens()[1] == model.tokens(PROMPTS[1:2])[0]


def test_bfloat16_is_near(model):
    half = Model(CONFIG, dtype="bfloat16").tokens(new=4)
    assert sum(a == b for x, y in zip(half, model.tokens(new=4), strict=True) for a, b in zip(x, y, strict=True)) >= 10


def test_a_stop_id_is_given_out_and_ends_its_sequence(model):
    free = model.tokens()
    stop = free[0][4]
    for row, expected in zip(model.tokens(stop_ids=[stop, 7777]), free, strict=True):
        assert row == (expected[: expected.index(stop) + 1] if stop in expected else expected)


def test_nothing_is_computed_after_the_last_sequence_ends(model):
    free = model.tokens(new=3)
    decoding = model.generator.start(model.loaded, PROMPTS, max_new_tokens=12, stop_ids=[row[0] for row in free])
    assert decoding.done
    assert decoding.tokens == [row[:1] for row in free]


def test_a_sequence_that_the_host_ends_stays_as_it_is(model):
    free = model.tokens(new=20)
    decoding = model.generator.start(model.loaded, PROMPTS, max_new_tokens=20)
    decoding.advance(3)
    decoding.end(2)
    while not decoding.done:
        decoding.advance(4)
    assert decoding.tokens == [row[:4] if number == 2 else row for number, row in enumerate(free)]


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[1], []], 5, "a prompt is empty"),
        ([], 5, "a prompt is empty"),
        ([[1, 131]], 5, "token 131 is outside the model's vocabulary of 131"),
        ([[-1]], 5, "token -1 is outside"),
        ([[1] * 200], 57, "200 prompt tokens and 57 new ones exceed the model's context of 256"),
    ],
)
def test_wrong_prompts_are_refused(model, prompts, new, message):
    with pytest.raises(UserError, match=message):
        model.tokens(prompts, new=new)


def test_the_whole_context_can_be_used(model):
    assert len(model.tokens([[1] * 240], new=16)[0]) == 16


def test_logits_that_are_not_finite_are_named():
    params = params_from_hf(hf_model(CONFIG), CONFIG)
    params["embedding"][77] = np.nan
    with pytest.raises(FloatingPointError, match="sequence 1: logits after 0 new tokens are not finite"):
        Model(CONFIG, params=params).tokens([[1, 2], [77, 3]])


def test_draws_follow_the_seed_and_the_stream_and_not_the_batch(model):
    def sample(seed, prompts=PROMPTS, **options):
        return model.tokens(prompts, sampling=Sampling(temperature=1.5, top_p=0.9, seed=seed), **options)

    together = sample(1)
    assert together == sample(1)
    assert together != sample(2)
    assert sample(1, PROMPTS[2:3], streams=[2]) == together[2:3]
    same = sample(1, [PROMPTS[0]] * 4)
    assert len({tuple(row) for row in same}) == 4
    assert sample(1, steps=3) == together
