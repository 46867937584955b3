"""Decoding with a KV cache: one compiled program for the prompts, one for every token after them.

Prompts are padded on the left, so that all sequences of a batch end together. One device.

Shapes: B sequences, P prompt length, S cache length, K kv heads, H head_dim, L layers, V vocab.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tlite_jax.config import ModelConfig
from tlite_jax.errors import UserError
from tlite_jax.model import decoder
from tlite_jax.model.attention import masked_attention
from tlite_jax.model.decoder import Decoder
from tlite_jax.model.layers import linear, rms_norm


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature} is negative; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is not in (0, 1]")


def generate(
    params: Any,
    model: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),
    dtype: str = "float32",
) -> Iterator[list[int | None]]:
    """Continues a batch of prompts, a token of each at a time.

    Args:
      params: nested dict of arrays of logical shape.
      model: their shape.
      prompts: token ids; each at least one.
      max_new_tokens: upper bound for every sequence.
      stop_ids: ids that end a sequence; they are given out, and None after them.
      sampling: greedy, or temperature and nucleus sampling.
      dtype: to compute in.

    Yields:
      The next id of each sequence, None for one that has ended.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, or a context longer than the model's.
    """
    longest = _checked_length(model, prompts, max_new_tokens)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    tokens = np.zeros((len(prompts), longest), np.int32)
    padding = np.array([longest - len(prompt) for prompt in prompts], np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    size = longest + max_new_tokens
    shape = (model.num_hidden_layers, len(prompts), size, model.num_key_value_heads, model.head_dim)
    cache = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    key = jax.random.key(sampling.seed)
    alive = [True] * len(prompts)
    inputs: Any = tokens
    position = 0
    for number in range(max_new_tokens):
        logits_BV, cache = _forward(params, inputs, cache, position, padding, model=model)
        position += inputs.shape[1]
        inputs = _choose(logits_BV, jax.random.fold_in(key, number), sampling)[:, None]
        chosen = np.asarray(inputs)[:, 0].tolist()
        yield [token if ok else None for token, ok in zip(chosen, alive, strict=True)]
        alive = [ok and token not in stop_ids for token, ok in zip(chosen, alive, strict=True)]
        if not any(alive):
            return


def _checked_length(model: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    if not prompts or not all(prompts):
        raise UserError("a prompt is empty: give at least one token")
    if outside := [token for prompt in prompts for token in prompt if not 0 <= token < model.vocab_size]:
        raise UserError(f"token {outside[0]} is outside the model's vocabulary of {model.vocab_size}")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > model.max_position_embeddings:
        raise UserError(
            f"{longest} prompt tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{model.max_position_embeddings}; shorten one of them"
        )
    return longest


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _forward(
    params: Any, tokens_BT: Any, cache: Any, position: Any, padding_B: Any, *, model: ModelConfig
) -> tuple[jax.Array, Any]:
    """Logits [B, V] float32 after the last token, and the cache with the new keys and values at `position`..."""
    network: Decoder = nnx.merge(decoder.graphdef(model), params)
    T = tokens_BT.shape[1]
    size = cache[0].shape[2]
    rows, columns = position + jnp.arange(T), jnp.arange(size)
    mask_BTS = (columns[None, None] <= rows[None, :, None]) & (columns[None, None] >= padding_B[:, None, None])
    # A padding query sees nothing; letting it see itself keeps its softmax finite. No later token looks at it.
    mask_BTS |= columns[None, None] == rows[None, :, None]
    rope = decoder.rope_at(model, jnp.maximum(rows[None] - padding_B[:, None], 0))

    def body(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        block, keys_BSKH, values_BSKH = layer
        q_BTNH, k_BTKH, v_BTKH = block.project(x_BTD, rope)
        keys_BSKH = jax.lax.dynamic_update_slice_in_dim(keys_BSKH, k_BTKH, position, axis=1)
        values_BSKH = jax.lax.dynamic_update_slice_in_dim(values_BSKH, v_BTKH, position, axis=1)
        attended_BTNH = masked_attention(q_BTNH, keys_BSKH, values_BSKH, mask_BTS)
        return block.finish(x_BTD, attended_BTNH), (keys_BSKH, values_BSKH)

    x_BTD, cache = jax.lax.scan(body, network.embedding[...][tokens_BT], (network.blocks, *cache))
    hidden_BD = rms_norm(x_BTD[:, -1:], network.final_norm[...], model.rms_norm_eps)[:, 0]
    head = network.embedding if model.tie_word_embeddings else network.head
    return linear(hidden_BD, head[...]).astype(jnp.float32), cache


@partial(jax.jit, static_argnames="sampling")
def _choose(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_p < 1:
        # Keep the most likely tokens up to and including the one that reaches top_p.
        ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities_BV = jax.nn.softmax(ordered_BV, axis=-1)
        kept_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV < sampling.top_p
        threshold_B1 = jnp.min(jnp.where(kept_BV, ordered_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)
