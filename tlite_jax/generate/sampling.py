"""How the next token is chosen from logits. The filters are those of transformers' generate, in its order.

Repetition penalty, temperature, top-k, top-p. Draws depend on the seed, the number of the sequence and the number of
the token in it, never on what else is in the batch.

Shapes: B sequences, V vocab.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tlite_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: 0 is greedy.
      top_k: only the k most likely tokens; 0: all.
      top_p: only the fewest most likely tokens that together reach this probability.
      repetition_penalty: logits of tokens of the prompt and the text so far are divided by it, or multiplied where they
        are negative (Keskar et al. 2019); also when greedy.
      seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} is not a number from 0 up; 0 is greedy")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} is negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is not in (0, 1]")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty {self.repetition_penalty} is not positive; 1 changes nothing")

    @property
    def traits(self) -> "Traits":
        """What of it is compiled into the loop."""
        draws = self.temperature > 0
        return Traits(draws, draws and (self.top_k > 0 or self.top_p < 1), self.repetition_penalty != 1)

    @property
    def values(self) -> "Values":
        """What of it is not."""
        return Values(
            jnp.float32(self.temperature or 1.0),
            jnp.int32(self.top_k),
            jnp.float32(self.top_p),
            jnp.float32(self.repetition_penalty),
        )


GREEDY = Sampling()


class Traits(NamedTuple):
    """Which parts of `choose` are needed at all."""

    draws: bool
    filters: bool
    penalizes: bool


class Values(NamedTuple):
    """Scalars on the device."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array


def choose(
    logits_BV: jax.Array, seen_BV: jax.Array | None, keys_B: jax.Array | None, values: Values, traits: Traits
) -> jax.Array:
    """The next tokens.

    Args:
      logits_BV: float32.
      seen_BV: bool, tokens of the prompt and the text so far; None unless `traits.penalizes`.
      keys_B: a key for each sequence's draw; None unless `traits.draws`.
      values: temperature and so on.
      traits: what of it to compute.

    Returns:
      int32 [B].
    """
    if traits.penalizes:
        assert seen_BV is not None
        logits_BV = penalize(logits_BV, seen_BV, values.repetition_penalty)
    if not traits.draws:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    assert keys_B is not None
    logits_BV = logits_BV / values.temperature
    if traits.filters:
        logits_BV = keep_likely(logits_BV, values.top_k, values.top_p)
    return _draw(keys_B, logits_BV)


def _draw(keys_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """A token of each distribution: where its cumulative probability passes a uniform number."""
    cumulative_BV = jnp.cumsum(jax.nn.softmax(logits_BV, axis=-1), axis=-1)
    uniform_B1 = jax.vmap(jax.random.uniform)(keys_B)[:, None]
    # Tokens without probability add nothing to the sum, so they are never where it passes.
    return jnp.sum(cumulative_BV <= uniform_B1 * cumulative_BV[:, -1:], axis=-1, dtype=jnp.int32)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Makes seen tokens less likely (transformers' RepetitionPenaltyLogitsProcessor)."""
    penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def keep_likely(logits_BV: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float) -> jax.Array:
    """Top-k, then top-p among what it kept; others become -inf.

    Equal to transformers' TopKLogitsWarper and TopPLogitsWarper one after the other, but for tokens of exactly equal
    logits at the edge of top-p: all of them are kept here, some of them there.
    """
    V = logits_BV.shape[-1]
    ordered_BV = jnp.sort(logits_BV, axis=-1)
    edge_B1 = jnp.take(ordered_BV, V - jnp.where(top_k > 0, jnp.minimum(top_k, V), V), axis=-1)[:, None]
    ordered_BV = jnp.where(ordered_BV < edge_B1, -jnp.inf, ordered_BV)
    # Summed from the least likely up, as transformers does it: what is removed sums to at most 1 - top_p.
    cumulative_BV = jnp.cumsum(jax.nn.softmax(ordered_BV, axis=-1), axis=-1)
    removed_BV = (cumulative_BV <= 1 - top_p) & (jnp.arange(V) < V - 1) & (top_p < 1)
    least_B1 = jnp.min(jnp.where(removed_BV, jnp.inf, ordered_BV), axis=-1, keepdims=True)
    return jnp.where(logits_BV < jnp.maximum(edge_B1, least_B1), -jnp.inf, logits_BV)


def draw_keys(seed_key: jax.Array, streams_B: jax.Array, number: jax.Array) -> jax.Array:
    """The key of every sequence's draw of its token `number`."""
    return jax.vmap(lambda stream: jax.random.fold_in(jax.random.fold_in(seed_key, stream), number))(streams_B)
