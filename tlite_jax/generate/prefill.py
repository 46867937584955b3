"""The model reading prompts and filling a KV cache, as one device of several runs it (under shard_map).

As in training, each device has sequences of its own and weights are gathered a layer at a time; the layers are a loop,
so that a new length of prompt compiles quickly.

Shapes: R sequences of this device, T tokens, S cache places, D embed, K kv heads, H head_dim, L layers, V vocab.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tlite_jax.config import ModelConfig
from tlite_jax.generate.network import Cache, LayerCache, by_head
from tlite_jax.model import decoder
from tlite_jax.model.attention import Attend
from tlite_jax.model.decoder import Block, Gather
from tlite_jax.model.layers import linear, rms_norm


def prefill(
    model: ModelConfig,
    params: Any,
    tokens_RT: jax.Array,
    padding_R: jax.Array,
    cache_length: int,
    *,
    gather: Gather,
    attend: Attend,
) -> tuple[jax.Array, Cache]:
    """Reads prompts that are padded on the left.

    Returns:
      Logits after the last token, float32 [R, V], and the cache of `cache_length` places.
    """
    T = tokens_RT.shape[1]
    network = nnx.merge(decoder.graphdef(model), params)
    rope = decoder.rope_at(model, jnp.maximum(jnp.arange(T) - padding_R[:, None], 0))
    # Padding attends to padding alone, and no token to it.
    segments_RT = (jnp.arange(T) >= padding_R[:, None]).astype(jnp.int32)
    widths = ((0, 0), (0, cache_length - T), (0, 0))

    def body(x_RTD: jax.Array, stored: Block) -> tuple[jax.Array, LayerCache]:
        block = gather(stored)
        q_RTNH, k_RTKH, v_RTKH = block.project(x_RTD, rope)
        x_RTD = block.finish(x_RTD, attend(q_RTNH, k_RTKH, v_RTKH, segments_RT))
        return x_RTD, LayerCache(*(jnp.pad(by_head(new), widths) for new in (k_RTKH, v_RTKH)))

    embedding = gather(network.embedding)
    x_RTD, stacked = jax.lax.scan(body, embedding[...][tokens_RT], network.blocks)
    hidden_RD = rms_norm(x_RTD[:, -1:], gather(network.final_norm)[...], model.rms_norm_eps)[:, 0]
    head = embedding if model.tie_word_embeddings else gather(network.head)
    layers = range(model.num_hidden_layers)
    cache = tuple(LayerCache(stacked.keys[layer], stacked.values[layer]) for layer in layers)
    return linear(hidden_RD, head[...]).astype(jnp.float32), cache
