"""The model reading one more token with a KV cache, as one device of several runs it (under shard_map).

Products are split by rows of the weights, and their outputs gathered; attention and its cache are split by sequences.
Every number is computed by one device as a single device would compute it.

Shapes: B sequences of this replica, R of them on this device, T tokens, S cache places, D embed, N heads, K kv heads,
G = N / K, H head_dim, F mlp, V vocab, O rows of a matrix on this device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tlite_jax.config import ModelConfig
from tlite_jax.generate.weights import Layer, Weights
from tlite_jax.model.decoder import rope_at
from tlite_jax.model.layers import apply_rope, linear, rms_norm
from tlite_jax.sharding import SHARDS


class LayerCache(NamedTuple):
    """Keys and values of a layer, [RK, S, H] (a row for each head of each sequence), in the compute dtype."""

    keys: jax.Array
    values: jax.Array


_MOST_SUMMED_ROWS = 64
Cache = tuple[LayerCache, ...]
Rope = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class StepNetwork:
    """The model; `num_shards` devices share its weights."""

    model: ModelConfig
    num_shards: int

    def step(
        self, weights: Weights, tokens_B: jax.Array, padding_B: jax.Array, place: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Reads one more token of each sequence, into the cache's `place`; logits [B, V] after it, and the cache."""
        rope = rope_at(self.model, (place - padding_B)[:, None])
        places_S = jnp.arange(cache[0].keys.shape[1])
        mask_RS = (places_S <= place) & (places_S >= self._own(padding_B)[:, None])
        x_BTD = self._embed(weights.embedding, tokens_B[:, None])
        new_cache = []
        for layer, old in zip(weights.layers, cache, strict=True):
            q_RTNH, k_RTKH, v_RTKH = self._project(layer, x_BTD, rope)
            keys = jax.lax.dynamic_update_slice_in_dim(old.keys, by_head(k_RTKH), place, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(old.values, by_head(v_RTKH), place, axis=1)
            attended_RNH = attend_cached(q_RTNH[:, 0], keys, values, mask_RS)
            x_BTD = self._finish(layer, x_BTD, attended_RNH[:, None])
            new_cache.append(LayerCache(keys, values))
        return self._logits(weights, x_BTD), tuple(new_cache)

    def _embed(self, embedding_OD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        if self.num_shards == 1:
            return embedding_OD[tokens_BT]
        size = embedding_OD.shape[0]
        local_BT = tokens_BT - jax.lax.axis_index(SHARDS) * size
        mine_BT = (local_BT >= 0) & (local_BT < size)
        found_BTD = jnp.where(mine_BT[..., None], embedding_OD[jnp.clip(local_BT, 0, size - 1)], 0)
        return jax.lax.psum(found_BTD, SHARDS)

    def _project(self, layer: Layer, x_BTD: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries and keys, and values, of this device's sequences: [R, T, heads, H]."""
        model = self.model
        normed_BTD = rms_norm(x_BTD, layer.attention_norm, model.rms_norm_eps)
        y_BTO = product(normed_BTD, layer.query_key_value, layer.query_key_value_bias)
        heads = (model.num_attention_heads, model.num_key_value_heads, model.num_key_value_heads)
        sizes = [count * model.head_dim for count in heads]
        q, k, v = self._gather_parts(y_BTO, sizes)
        q, k, v = (
            self._own(x).reshape(-1, x.shape[1], count, model.head_dim)
            for x, count in zip((q, k, v), heads, strict=True)
        )
        own_rope = tuple(table if table.shape[0] == 1 else self._own(table) for table in rope)
        return apply_rope(q, own_rope), apply_rope(k, own_rope), v  # type: ignore[arg-type]

    def _finish(self, layer: Layer, x_BTD: jax.Array, attended_RTNH: jax.Array) -> jax.Array:
        model = self.model
        R, T = attended_RTNH.shape[:2]
        attended_BTI = self._whole(attended_RTNH.reshape(R, T, -1))
        y_BTO = product(attended_BTI, layer.output, layer.output_bias)
        x_BTD = x_BTD + self._gather(y_BTO, model.hidden_size)
        normed_BTD = rms_norm(x_BTD, layer.mlp_norm, model.rms_norm_eps)
        gate_BTO, up_BTO = jnp.split(product(normed_BTD, layer.gate_up), 2, axis=-1)
        inner_BTF = self._gather(jax.nn.silu(gate_BTO) * up_BTO, model.intermediate_size)
        return x_BTD + self._gather(product(inner_BTF, layer.down), model.hidden_size)

    def _logits(self, weights: Weights, x_B1D: jax.Array) -> jax.Array:
        hidden_BD = rms_norm(x_B1D, weights.final_norm, self.model.rms_norm_eps)[:, 0]
        return self._gather(product(hidden_BD, weights.head), self.model.vocab_size).astype(jnp.float32)

    def _gather(self, y_O: jax.Array, size: int) -> jax.Array:
        """Outputs of all devices side by side, without padding."""
        if self.num_shards == 1:
            return y_O
        whole = jax.lax.all_gather(y_O, SHARDS, axis=y_O.ndim - 1, tiled=True)
        return whole[..., :size]

    def _gather_parts(self, y_BTO: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
        """`_gather` of several outputs that lie side by side on each device."""
        local = [-(-size // self.num_shards) for size in sizes]
        bounds = [sum(local[:number]) for number in range(1, len(local))]
        if self.num_shards == 1:
            return jnp.split(y_BTO, bounds, axis=-1)
        y_BTXO = jax.lax.all_gather(y_BTO, SHARDS, axis=2)
        parts = jnp.split(y_BTXO, bounds, axis=-1)
        return [part.reshape(*part.shape[:2], -1)[..., :size] for part, size in zip(parts, sizes, strict=True)]

    def _own(self, x_B: jax.Array) -> jax.Array:
        """The sequences of this device, out of the replica's."""
        if self.num_shards == 1:
            return x_B
        size = x_B.shape[0] // self.num_shards
        return jax.lax.dynamic_slice_in_dim(x_B, jax.lax.axis_index(SHARDS) * size, size)

    def _whole(self, x_R: jax.Array) -> jax.Array:
        return x_R if self.num_shards == 1 else jax.lax.all_gather(x_R, SHARDS, tiled=True)


def product(x: jax.Array, weight_OI: jax.Array, bias_O: jax.Array | None = None) -> jax.Array:
    """`layers.linear` for the rows of a decoding step; on a CPU a few rows of float32 are multiplied as sums.

    XLA packs all weights of a product anew each time, which takes as long as the product itself where rows are few. For
    one row it packs nothing, and many make up for it.
    """
    num_rows = x.size // x.shape[-1]
    if not 1 < num_rows <= _MOST_SUMMED_ROWS or x.dtype != jnp.float32:
        return linear(x, weight_OI, bias_O)
    return jax.lax.platform_dependent(x, weight_OI, bias_O, cpu=_summed, default=linear)


def _summed(x: jax.Array, weight_OI: jax.Array, bias_O: jax.Array | None) -> jax.Array:
    # Barriers keep the sums as they are: fused with their neighbours they take several times as long.
    x_XI = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
    y_XO = jax.lax.optimization_barrier(jnp.sum(weight_OI[:, None] * x_XI, axis=-1)).T
    y = y_XO.reshape(*x.shape[:-1], -1)
    return y if bias_O is None else y + bias_O


def by_head(x_RTKH: jax.Array) -> jax.Array:
    """Keys or values as the cache holds them, [RK, T, H]: products read them there without a transposition."""
    R, T, K, H = x_RTKH.shape
    return jnp.swapaxes(x_RTKH, 1, 2).reshape(R * K, T, H)


def attend_cached(q_RNH: jax.Array, keys_XSH: jax.Array, values_XSH: jax.Array, mask_RS: jax.Array) -> jax.Array:
    """Attention of one query of each sequence over its cache, [RK, S, H]; softmax in float32. Returns [R, N, H]."""
    R, N, H = q_RNH.shape
    X = keys_XSH.shape[0]
    q_XGH = q_RNH.reshape(X, -1, H)
    scores_XGS = jnp.einsum("xgh,xsh->xgs", q_XGH, keys_XSH, preferred_element_type=jnp.float32) * H**-0.5
    mask_X1S = jnp.repeat(mask_RS, X // R, axis=0)[:, None]
    weights_XGS = jax.nn.softmax(jnp.where(mask_X1S, scores_XGS, jnp.finfo(jnp.float32).min), axis=-1)
    attended_XGH = jnp.einsum("xgs,xsh->xgh", weights_XGS.astype(values_XSH.dtype), values_XSH)
    return attended_XGH.reshape(R, N, H)
