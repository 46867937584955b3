from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import QUICK

from tlite_jax.loss import IGNORED, cross_entropy, cross_entropy_and_gradients, num_scored, token_losses

B, T, D, V = 3, 14, 8, 101
UNCHUNKED = B * T


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    targets[:, -1] = IGNORED
    targets[1, 4:] = IGNORED
    targets[0, 0], targets[0, 1] = 0, V - 1
    return hidden.astype(np.float32), head.astype(np.float32), targets


@partial(jax.jit, static_argnames="chunk_tokens", compiler_options=QUICK)
def loss_and_gradients(hidden, head, targets, chunk_tokens):
    losses, gradients = cross_entropy_and_gradients(hidden, head, targets, chunk_tokens=chunk_tokens)
    return losses.sum(), *gradients


# 42 tokens: all, a divisor, five chunks with padding, two even ones, a token at a time, more than there are
@pytest.mark.parametrize("chunk_tokens", [UNCHUNKED, 14, 9, 29, 1, 1000])
def test_loss_and_gradients_equal_torch(inputs, chunk_tokens):
    hidden, head, targets = inputs
    torch_hidden, torch_head = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (hidden, head))
    expected = torch.nn.functional.cross_entropy(
        (torch_hidden @ torch_head.T).reshape(-1, V),
        torch.from_numpy(targets).long().reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )
    expected.backward()
    loss, d_hidden, d_head = loss_and_gradients(hidden, head, targets, chunk_tokens)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(expected.item(), rel=3e-7)
    np.testing.assert_allclose(d_hidden, torch_hidden.grad, atol=3e-6, rtol=0)
    np.testing.assert_allclose(d_head, torch_head.grad, atol=1e-5, rtol=0)
    assert np.all(np.asarray(d_hidden)[targets == IGNORED] == 0)


def test_autodiff_gives_the_same(inputs):
    hidden, head, targets = inputs

    def summed(hidden, head):
        return cross_entropy(hidden, head, targets, chunk_tokens=9)

    loss, gradients = jax.jit(jax.value_and_grad(lambda *x: summed(*x)[0], argnums=(0, 1)), compiler_options=QUICK)(
        hidden, head
    )
    expected_loss, *expected = loss_and_gradients(hidden, head, targets, 9)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    assert summed(hidden, head)[1] == num_scored(targets) == np.sum(targets != IGNORED) == 30
    assert list(num_scored(targets, axis=1)) == [13, 4, 13]
    for gradient, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk_tokens", [UNCHUNKED, 9])
def test_every_tokens_loss_lies_at_its_place(inputs, chunk_tokens):
    hidden, head, targets = inputs
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64)
    log_probabilities = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    expected = -np.take_along_axis(log_probabilities, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    expected[targets == IGNORED] = 0

    def with_gradients(*arrays, chunk_tokens):
        return cross_entropy_and_gradients(*arrays, chunk_tokens=chunk_tokens)[0]

    for function in (token_losses, with_gradients):
        losses = jax.jit(partial(function, chunk_tokens=chunk_tokens), compiler_options=QUICK)(hidden, head, targets)
        assert losses.dtype == jnp.float32
        np.testing.assert_allclose(losses, expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("chunk_tokens", [UNCHUNKED, 9])
def test_nothing_scored_is_zero_not_nan(inputs, chunk_tokens):
    hidden, head, targets = inputs
    loss, *gradients = loss_and_gradients(hidden, head, np.full_like(targets, IGNORED), chunk_tokens)
    assert loss == 0
    for gradient in gradients:
        assert np.all(np.asarray(gradient) == 0)


def test_large_logits_do_not_overflow(inputs):
    hidden, head, targets = inputs
    loss, *gradients = loss_and_gradients(hidden * 100, head * 100, targets, 9)
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_bfloat16_is_summed_in_float32(inputs):
    """Logits are rounded to bfloat16 once (2^-8 of at most 16); the softmax and the sums are not."""
    hidden, head, targets = inputs
    half = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    loss, *gradients = loss_and_gradients(*half, targets, 9)
    exact, *_ = loss_and_gradients(*(x.astype(jnp.float32) for x in half), targets, 9)
    assert loss.dtype == jnp.float32
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32]
    assert float(loss) == pytest.approx(float(exact), abs=30 * 16 * 2**-8)
    assert float(loss) == pytest.approx(float(exact), rel=5e-3)


def test_at_most_a_chunk_of_logits_exists(inputs):
    """No array of the traced program, backward included, has more rows of the vocabulary than a chunk has tokens."""
    hidden, head, targets = inputs

    def widest(chunk_tokens):
        jaxpr = jax.make_jaxpr(partial(loss_and_gradients.__wrapped__, chunk_tokens=chunk_tokens))(
            hidden, head, targets
        )
        return max(_rows_of_logits(jaxpr.jaxpr))

    assert widest(UNCHUNKED) == B * T
    # Five chunks of 9 cover 42 tokens in even parts.
    assert widest(10) == 9
    assert widest(7) == 7


def _rows_of_logits(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if variable.aval.shape[-1:] == (V,):
                yield variable.aval.size // V
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _rows_of_logits(inner)
