"""Filters against transformers' own, on the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tlite_jax.errors import UserError
from tlite_jax.generate import Sampling
from tlite_jax.generate.sampling import choose, keep_likely, penalize

ROWS, VOCAB = 16, 997


@pytest.fixture(scope="module")
def logits():
    return (4 * np.random.default_rng(0).normal(size=(ROWS, VOCAB))).astype(np.float32)


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(0, 0.9), (0, 0.5), (0, 1e-9), (0, 0.999), (1, 1.0), (7, 1.0), (50, 0.7), (5000, 0.9), (0, 1.0)],
)
@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_filters_keep_what_transformers_keeps(logits, top_k, top_p, temperature):
    expected = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = np.asarray(keep_likely(jnp.asarray(logits) / temperature, top_k, top_p))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected.numpy()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_the_repetition_penalty_is_transformers(logits):
    read = np.random.default_rng(1).integers(0, VOCAB, (ROWS, 30))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(read), torch.tensor(logits))
    seen = np.zeros(logits.shape, bool)
    seen[np.arange(ROWS)[:, None], read] = True
    np.testing.assert_allclose(penalize(logits, seen, 1.7), expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1.0, {0, 1, 2, 3}), (0.95, {0, 1, 2, 3}), (0.85, {0, 1, 2}), (0.6, {0, 1}), (0.01, {0})]
)
def test_draws_have_the_probabilities_that_are_left(top_p, kept):
    """Probabilities 0.5, 0.25, 0.15 and 0.1 at temperature 2, in another order in each of 500 rows."""
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(4) for _ in range(500)])
    logits = 2 * np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))[order]
    sampling = Sampling(temperature=2.0, top_p=top_p)
    keys = jax.random.split(jax.random.key(0), 500)
    chosen = choose(jnp.asarray(logits), None, keys, sampling.values, sampling.traits)
    ranks = np.take_along_axis(order, np.asarray(chosen)[:, None], axis=1)[:, 0]
    assert set(ranks.tolist()) == kept
    if top_p == 1:
        np.testing.assert_allclose(np.bincount(ranks) / 500, [0.5, 0.25, 0.15, 0.1], atol=0.06)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, r"\(0, 1\]"),
        ({"top_k": -1}, "top_k -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
    ],
)
def test_sampling_refuses_what_makes_no_sense(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(**values)
