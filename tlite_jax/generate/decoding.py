"""Decoding a batch: one compiled program for the prompts, one that writes several tokens before the host looks.

Prompts are padded on the left, so that all sequences of a batch end together; lengths are rounded up, so that few
programs are compiled. Sequences are dealt out over all devices of a mesh.

Shapes: B sequences, T prompt length, S cache length, V vocab, C tokens written at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tlite_jax.config import ExecutionConfig, ModelConfig
from tlite_jax.errors import UserError
from tlite_jax.generate.network import Cache, LayerCache, StepNetwork
from tlite_jax.generate.prefill import prefill
from tlite_jax.generate.sampling import GREEDY, Sampling, Traits, Values, choose, draw_keys
from tlite_jax.generate.weights import Weights, make_arrange, weight_specs
from tlite_jax.model import attention, decoder
from tlite_jax.sharding import (
    REPLICA,
    ROWS_SPEC,
    SHARDS,
    Collectives,
    make_gather,
    num_shards,
    partition_specs,
)

_LENGTH_STEP = 64
MOST_STOP_IDS = 16
MOST_STEPS = 32  # tokens written before the host looks
ENDED = -1  # in place of a token after a sequence's end


class State(NamedTuple):
    """What the loop carries.

    Attributes:
      tokens: int32 [B], the last token of each sequence.
      alive: bool [B], sequences that go on.
      place: int32, where the next key and value are written.
      number: int32, tokens written so far.
      seen: bool [B, V] tokens of the prompt and the text, or [B, 0] when nobody asks.
      finite: bool [B], whether all logits so far were.
      cache: keys and values.
    """

    tokens: jax.Array
    alive: jax.Array
    place: jax.Array
    number: jax.Array
    seen: jax.Array
    finite: jax.Array
    cache: Cache


class Fixed(NamedTuple):
    """What the loop reads: [B] padding and streams, [MOST_STOP_IDS] stop ids, a seed's key, sampling's values."""

    padding: jax.Array
    streams: jax.Array
    stop_ids: jax.Array
    key: jax.Array
    values: Values


class Generator:
    """Writes text with a model, on a mesh.

    Args:
      model: shape of the model.
      mesh: from `make_mesh`.
      dtype: to compute in and to keep the cache in.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, *, dtype: str = "float32"):
        self.model, self.mesh, self._dtype = model, mesh, dtype
        self._network = StepNetwork(model, num_shards(mesh))
        self._arrange = make_arrange(model, mesh, dtype)
        execution = ExecutionConfig.model_validate({"compute_dtype": dtype})
        self._gather = make_gather(decoder.logical_axes(model), Collectives.of(mesh, execution))
        self._programs: dict[Any, Callable[..., Any]] = {}

    def load(self, params: Any) -> "Loaded":
        """Prepares stored, sharded parameters; the decoding loop's are a copy, in the compute dtype."""
        return Loaded(params, self._arrange(params))

    def start(
        self,
        loaded: "Loaded",
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        sampling: Sampling = GREEDY,
        streams: Sequence[int] | None = None,
    ) -> "Decoding":
        """Reads a batch of prompts and writes the first token of each.

        Args:
          loaded: from `load`.
          prompts: token ids, at least one each.
          max_new_tokens: most tokens of every sequence, at least 1.
          stop_ids: ids that end a sequence; they are given out as its last token.
          sampling: how tokens are chosen.
          streams: a number for each prompt that its draws follow besides the seed; None: 0, 1, 2, ...

        Raises:
          UserError: no prompt or an empty one, an id outside the vocabulary, more than the model's context.
        """
        self._check(prompts, max_new_tokens, stop_ids)
        length = _rounded(max(map(len, prompts)))
        cache_length = length + _rounded(max_new_tokens)
        rows = self.mesh.size << (-(-len(prompts) // self.mesh.size) - 1).bit_length()
        tokens = np.zeros((rows, length), np.int32)
        padding = np.full(rows, length - 1, np.int32)  # rows that are not asked for read one token
        for row, prompt in enumerate(prompts):
            tokens[row, length - len(prompt) :] = prompt
            padding[row] = length - len(prompt)
        stops = np.full(MOST_STOP_IDS, ENDED, np.int32)
        stops[: len(stop_ids)] = stop_ids
        numbers = np.zeros(rows, np.int32)
        numbers[: len(prompts)] = range(len(prompts)) if streams is None else streams
        place = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), _FIXED_SPECS)
        # Made on all devices, others' included: an array of this process alone could not be placed there.
        key = jax.jit(jax.random.key, out_shardings=place.key)(sampling.seed)
        values = jax.tree.map(np.asarray, sampling.values)
        fixed = jax.device_put(Fixed(padding, numbers, stops, key, values), place)  # type: ignore[arg-type]
        alive = jax.device_put(np.arange(rows) < len(prompts), place.padding)
        asked = jax.device_put(tokens, NamedSharding(self.mesh, ROWS_SPEC))
        read = self._program("prefill", sampling.traits, cache_length)
        state, report = read(loaded.params, asked, alive, fixed)
        decode = self._program("decode", sampling.traits)
        return Decoding(decode, loaded.weights, state, report, fixed, len(prompts), max_new_tokens)

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int]) -> None:
        assert max_new_tokens > 0
        assert len(stop_ids) <= MOST_STOP_IDS
        if not prompts or not all(map(len, prompts)):
            raise UserError("a prompt is empty: give at least one token")
        vocab, most = self.model.vocab_size, self.model.max_position_embeddings
        if outside := [token for prompt in prompts for token in prompt if not 0 <= token < vocab]:
            raise UserError(f"token {outside[0]} is outside the model's vocabulary of {vocab}")
        longest = max(map(len, prompts))
        if longest + max_new_tokens > most:
            raise UserError(
                f"{longest} prompt tokens and {max_new_tokens} new ones exceed the model's context of {most}; "
                "shorten one of them"
            )

    def _program(self, name: str, traits: Traits, cache_length: int = 0) -> Callable[..., Any]:
        key = name, traits, cache_length
        if key not in self._programs:
            make = {"prefill": self._make_prefill, "decode": self._make_decode}[name]
            self._programs[key] = make(traits, cache_length)
        return self._programs[key]

    def _make_prefill(self, traits: Traits, cache_length: int) -> Callable[..., Any]:
        def local(params: Any, tokens_RT: jax.Array, alive_B: jax.Array, fixed: Fixed) -> Any:
            R, T = tokens_RT.shape
            attend = attention.select_for(
                self.mesh.devices.flat[0],
                "auto",
                dtype=self._dtype,
                document_masking=True,  # padding is a document of its own
                sequence_length=T,
                head_dim=self.model.head_dim,
            )
            padding_R = jax.lax.dynamic_slice_in_dim(fixed.padding, self._shard_index() * R, R)
            logits_RV, cache = prefill(
                self.model, params, tokens_RT, padding_R, cache_length, gather=self._gather, attend=attend
            )
            tokens_BT, logits_BV = (self._whole(x) for x in (tokens_RT, logits_RV))
            seen = _read_tokens(tokens_BT, fixed.padding, self.model.vocab_size if traits.penalizes else 0)
            nothing = jnp.zeros(alive_B.shape, jnp.int32)
            state = State(nothing, alive_B, jnp.int32(T), jnp.int32(0), seen, alive_B | True, cache)
            state = _next(logits_BV, state, fixed, traits)
            return state, self._everyones(state, state.tokens[:, None])

        specs = partition_specs(decoder.param_specs(self.model)), ROWS_SPEC, _REPLICA_ROWS, _FIXED_SPECS
        return self._jit(local, specs)

    def _shard_index(self) -> jax.Array | int:
        return 0 if num_shards(self.mesh) == 1 else jax.lax.axis_index(SHARDS)

    def _whole(self, x_R: jax.Array) -> jax.Array:
        """Rows of all devices of this replica."""
        return x_R if num_shards(self.mesh) == 1 else jax.lax.all_gather(x_R, SHARDS, tiled=True)

    def _make_decode(self, traits: Traits, _: int) -> Callable[..., Any]:
        def local(weights: Weights, state: State, fixed: Fixed, count: jax.Array) -> Any:
            def goes_on(carry: Any) -> jax.Array:
                _, _, done, num_alive = carry
                return (done < count) & (num_alive > 0)

            def body(carry: Any) -> Any:
                state, written_BC, done, _ = carry
                was_alive_B = state.alive
                logits_BV, cache = self._network.step(weights, state.tokens, fixed.padding, state.place, state.cache)
                state = _next(logits_BV, state._replace(cache=cache, place=state.place + 1), fixed, traits)
                column_B1 = jnp.where(was_alive_B, state.tokens, ENDED)[:, None]
                written_BC = jax.lax.dynamic_update_slice_in_dim(written_BC, column_B1, done, axis=1)
                return state, written_BC, done + 1, self._num_alive(state)

            written_BC = jnp.full((state.tokens.shape[0], MOST_STEPS), ENDED, jnp.int32)
            start = state, written_BC, jnp.int32(0), self._num_alive(state)
            state, written_BC, _, _ = jax.lax.while_loop(goes_on, body, start)
            return state, self._everyones(state, written_BC)

        specs = weight_specs(self.model, self.mesh), self._state_specs(), _FIXED_SPECS, PartitionSpec()
        return self._jit(local, specs, donate=(1,))

    def _jit(self, local: Callable[..., Any], specs: Any, donate: tuple[int, ...] = ()) -> Callable[..., Any]:
        """Compiles a function that returns the state and what the host wants to know."""
        out_specs = self._state_specs(), Report._make([PartitionSpec()] * 3)
        sharded = jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
        return jax.jit(sharded, donate_argnums=donate)

    def _state_specs(self) -> State:
        layer = LayerCache._make((ROWS_SPEC, ROWS_SPEC))
        rows, scalar = _REPLICA_ROWS, PartitionSpec()
        return State._make((rows, rows, scalar, scalar, rows, rows, (layer,) * self.model.num_hidden_layers))

    def _everyones(self, state: State, written_BC: jax.Array) -> "Report":
        report = Report(written_BC, state.alive, state.finite)
        if self.mesh.shape[REPLICA] == 1:
            return report
        return jax.tree.map(lambda x: jax.lax.all_gather(x, REPLICA, tiled=True), report)

    def _num_alive(self, state: State) -> jax.Array:
        """On all devices the same, so that all leave the loop together."""
        num_alive = jnp.sum(state.alive, dtype=jnp.int32)
        return num_alive if self.mesh.shape[REPLICA] == 1 else jax.lax.psum(num_alive, REPLICA)


class Loaded(NamedTuple):
    """A model's parameters, as prompts and as the loop want them."""

    params: Any
    weights: Weights


class Report(NamedTuple):
    """What the host reads of all sequences: [B, C] tokens written, ENDED after an end; [B] alive, finite."""

    written: jax.Array
    alive: jax.Array
    finite: jax.Array


class Decoding:
    """A batch that is being written.

    Attributes:
      tokens: ids written so far, of each sequence.
      alive: whether a sequence goes on.
    """

    def __init__(
        self,
        decode: Callable[..., Any],
        weights: Weights,
        state: State,
        report: Report,
        fixed: Fixed,
        count: int,
        most: int,
    ):
        self._decode, self._weights, self._state, self._fixed, self._most = decode, weights, state, fixed, most
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.alive = [True] * count
        self._take(report)

    @property
    def done(self) -> bool:
        """Whether nothing more will be written."""
        return not any(self.alive)

    def advance(self, steps: int) -> None:
        """Writes up to `steps` more tokens (MOST_STEPS at most) of each sequence that goes on."""
        if self.done:
            return
        alive = np.zeros(self._fixed.padding.shape, bool)
        alive[: len(self.alive)] = self.alive
        state = self._state._replace(alive=jax.device_put(alive, self._state.alive.sharding))
        written = max(map(len, self.tokens))
        count = np.int32(min(steps, MOST_STEPS, self._most - written))
        self._state, report = self._decode(self._weights, state, self._fixed, count)
        self._take(report)

    def end(self, sequence: int) -> None:
        """Writes no more of a sequence."""
        self.alive[sequence] = False

    def _take(self, report: Report) -> None:
        written, alive, finite = (np.asarray(x) for x in report)
        for number, tokens in enumerate(self.tokens):
            if not finite[number]:
                raise FloatingPointError(
                    f"sequence {number}: logits after {len(tokens)} new tokens are not finite; the model's weights are "
                    "damaged, or too large for its dtype"
                )
            if self.alive[number]:
                tokens += written[number][written[number] != ENDED].tolist()
                self.alive[number] = bool(alive[number]) and len(tokens) < self._most


def _next(logits_BV: jax.Array, state: State, fixed: Fixed, traits: Traits) -> State:
    """The state after choosing a token from logits."""
    keys_B = draw_keys(fixed.key, fixed.streams, state.number) if traits.draws else None
    chosen_B = choose(logits_BV, state.seen if traits.penalizes else None, keys_B, fixed.values, traits)
    seen = state.seen
    if traits.penalizes:
        seen = seen.at[jnp.arange(len(chosen_B)), chosen_B].set(True)
    return state._replace(
        tokens=chosen_B,
        alive=state.alive & ~jnp.any(chosen_B[:, None] == fixed.stop_ids, axis=1),
        number=state.number + 1,
        seen=seen,
        finite=state.finite & (jnp.isfinite(jnp.sum(logits_BV, axis=-1)) | ~state.alive),
    )


def _read_tokens(tokens_BT: jax.Array, padding_B: jax.Array, vocab: int) -> jax.Array:
    """Which tokens a prompt has, bool [B, vocab]."""
    B, T = tokens_BT.shape
    read_BT = jnp.where(jnp.arange(T) >= padding_B[:, None], tokens_BT, vocab)
    return jnp.zeros((B, vocab), bool).at[jnp.arange(B)[:, None], read_BT].set(True, mode="drop")


def _rounded(length: int) -> int:
    """Lengths that programs are compiled for: multiples of _LENGTH_STEP, ever coarser ones, an eighth more at most."""
    step = max(_LENGTH_STEP, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


_REPLICA_ROWS = PartitionSpec(REPLICA)
_VALUES_SPECS: Any = Values._make([PartitionSpec()] * 4)
_FIXED_SPECS = Fixed._make((_REPLICA_ROWS, _REPLICA_ROWS, PartitionSpec(), PartitionSpec(), _VALUES_SPECS))
