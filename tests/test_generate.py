import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import ROPE_SCALING, hf_model, params_from_hf, tiny_model

from tlite_jax.errors import UserError
from tlite_jax.generate import Sampling, _choose, generate

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


@pytest.fixture(scope="module")
def params():
    return params_from_hf(hf_model(CONFIG), CONFIG)


def columns(steps):
    return [list(column) for column in zip(*steps, strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_transformers(name):
    config = CONFIGS[name]
    reference = hf_model(config)
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    expected = reference.generate(
        padded, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None
    )[:, longest:]
    ours = columns(generate(params_from_hf(reference, config), config, PROMPTS, max_new_tokens=40))
    assert ours == expected.tolist()
    assert len({token for row in ours for token in row}) > 20, "a model that repeats itself tests little"


def test_a_prompt_is_continued_as_it_is_alone(params):
    together = columns(generate(params, CONFIG, PROMPTS, max_new_tokens=12))
    alone = columns(generate(params, CONFIG, PROMPTS[1:2], max_new_tokens=12))
    assert together[1] == alone[0]


def test_a_stop_id_is_given_out_and_ends_its_sequence(params):
    free = columns(generate(params, CONFIG, PROMPTS, max_new_tokens=12))
    stop = free[0][4]
    steps = list(generate(params, CONFIG, PROMPTS, max_new_tokens=12, stop_ids=[stop, CONFIG.vocab_size + 5]))
    for row, expected in zip(columns(steps), free, strict=True):
        end = expected.index(stop) + 1 if stop in expected else len(expected)
        assert row == (expected[:end] + [None] * len(expected))[: len(steps)]
    assert columns(steps)[0][4:6] == [stop, None]


def test_nothing_is_computed_after_the_last_sequence_ends(params):
    free = columns(generate(params, CONFIG, PROMPTS, max_new_tokens=3))
    stops = [row[0] for row in free]
    assert list(generate(params, CONFIG, PROMPTS, max_new_tokens=12, stop_ids=stops)) == [stops]
    assert list(generate(params, CONFIG, PROMPTS, max_new_tokens=0)) == []


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
def test_wrong_prompts_are_refused(params, prompts, new, message):
    with pytest.raises(UserError, match=message):
        list(generate(params, CONFIG, prompts, max_new_tokens=new))


def test_the_whole_context_can_be_used(params):
    steps = list(generate(params, CONFIG, [[1] * 255], max_new_tokens=1))
    assert len(steps) == 1


def test_sampling_follows_the_seed(params):
    def sample(seed):
        sampling = Sampling(temperature=1.5, top_p=0.9, seed=seed)
        return columns(generate(params, CONFIG, PROMPTS, max_new_tokens=12, sampling=sampling))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1.0, {0, 1, 2, 3}), (0.95, {0, 1, 2, 3}), (0.85, {0, 1, 2}), (0.6, {0, 1}), (0.01, {0})]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    """Probabilities 0.5, 0.25, 0.15 and 0.1 at temperature 2, in another order in each of 500 rows."""
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(4) for _ in range(500)])
    logits = 2 * np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))[order]
    chosen = _choose(jnp.asarray(logits), jax.random.key(0), Sampling(temperature=2.0, top_p=top_p))
    ranks = np.take_along_axis(order, np.asarray(chosen)[:, None], axis=1)[:, 0]
    assert set(ranks.tolist()) == kept
    if top_p == 1:
        np.testing.assert_allclose(np.bincount(ranks) / 500, [0.5, 0.25, 0.15, 0.1], atol=0.06)


@pytest.mark.parametrize(("values", "message"), [({"temperature": -1.0}, "negative"), ({"top_p": 0.0}, r"\(0, 1\]")])
def test_sampling_refuses_what_makes_no_sense(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(**values)
