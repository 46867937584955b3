"""Log-likelihoods of token sequences under a model whose parameters stay sharded.

Only hidden states of scored places meet the head, a few at a time: logits of whole rows never exist.

Shapes: B rows, T tokens of a row, S scored places of a row, D embed, V vocab, C places at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tlite_jax.config import ExecutionConfig, ModelConfig
from tlite_jax.errors import UserError
from tlite_jax.evaluate.packing import Row, Scoring, pack
from tlite_jax.evaluate.tree_attention import tree_attention
from tlite_jax.model import attention, decoder
from tlite_jax.model.layers import linear
from tlite_jax.sharding import ROWS_SPEC, Collectives, make_gather, partition_specs

BATCH_TOKENS = 4096
LEAST_PLACES = 16
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scored:
    """What a model thinks of a continuation.

    Attributes:
      logprobs: [tokens] float32 nats, of each token of the continuation given all before it.
      is_greedy: whether every token is the most likely one.
    """

    logprobs: np.ndarray
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """Summed, in float64."""
        return float(np.sum(self.logprobs, dtype=np.float64))


class NonFiniteError(FloatingPointError):
    """A model gave a log-probability that is not finite; names the request, by its number."""

    def __init__(self, message: str, request: int):
        super().__init__(message)
        self.request = request


class Scorer:
    """Scores continuations with a compiled forward pass, rows dealt out over all devices of a mesh.

    Args:
      model: shape of the model.
      mesh: from `make_mesh`.
      dtype: to compute in; log-softmax is float32 always.
      max_length: most tokens that the model reads at once; None: its max_position_embeddings.
      batch_tokens: tokens at a time on each device; a row longer than that is computed alone.
    """

    def __init__(
        self,
        model: ModelConfig,
        mesh: Mesh,
        *,
        dtype: str = "float32",
        max_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ):
        self.max_length = max_length or model.max_position_embeddings
        self.num_truncated = 0
        self.num_computed_tokens = 0
        self._model, self._mesh, self._batch_tokens = model, mesh, batch_tokens
        execution = ExecutionConfig.model_validate({"compute_dtype": dtype})
        self._programs = {branched: _program(model, execution, mesh, branched=branched) for branched in (False, True)}

    def score(
        self, params: Any, requests: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Progress | None = None
    ) -> list[Scored]:
        """Scores (context, continuation) pairs of token ids, in any number and order.

        What is too long for the model loses its beginning, as in lm-evaluation-harness: the model reads the last
        max_length + 1 tokens of both, less the last one. `num_truncated` counts such requests.

        Args:
          params: stored, sharded parameters.
          requests: a context of at least one token, a continuation of one to max_length tokens.
          progress: called with (requests done, requests in all).

        Raises:
          UserError: a context or a continuation is empty, a continuation is too long, an id is not in the vocabulary.
          NonFiniteError: a log-probability is not finite; names the request.
        """
        scorings = [self._scoring(number, *request) for number, request in enumerate(requests)]
        rows = pack(scorings)
        self.num_computed_tokens += sum(row.length for row in rows)
        results: dict[int, Scored] = {}
        waiting: list[tuple[list[Row], Any]] = []
        for batch in [*self._batches(rows), None]:
            if batch is not None:
                waiting.append((batch, self._start(params, batch)))
            if len(waiting) > (batch is not None):  # read a batch back while the next one is computed
                read, answer = waiting.pop(0)
                results |= _read(read, answer)
                if broken := [row for row in read if not _is_finite(row, results)]:
                    self._blame(params, scorings, [number for number, *_ in broken[0].requests])
                if progress is not None:
                    progress(len(results), len(requests))
        return [results[number] for number in range(len(requests))]

    def _blame(self, params: Any, scorings: Sequence[Scoring], numbers: Sequence[int]) -> NoReturn:
        """Raises for the first of some requests whose score is not finite when it is computed alone."""
        for number in numbers:
            batch = pack([scorings[number]])
            alone = _read(batch, self._start(params, batch))
            if not _is_finite(batch[0], alone):
                raise NonFiniteError(
                    f"request {number}: a log-probability is {float(np.min(alone[0].logprobs))}; the model's weights "
                    "are damaged, or too large for its dtype",
                    number,
                )
        raise NonFiniteError(f"a batch with request {numbers[0]}: a log-probability is not finite", numbers[0])

    def _scoring(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> Scoring:
        if not context or not continuation:
            raise UserError(f"request {number}: {'its continuation' if context else 'its context'} has no tokens")
        if len(continuation) > self.max_length:
            raise UserError(
                f"request {number}: a continuation of {len(continuation)} tokens, the model reads {self.max_length} "
                "at most; shorten it or score it in windows"
            )
        whole = (*context, *continuation)
        if outside := [token for token in whole if not 0 <= token < self._model.vocab_size]:
            raise UserError(
                f"request {number}: token {outside[0]} is outside the model's vocabulary of {self._model.vocab_size}"
            )
        self.num_truncated += len(whole) > self.max_length + 1
        return Scoring(tuple(whole[-(self.max_length + 1) :][:-1]), tuple(continuation))

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Rows of one length, as many as the budget allows."""
        first = 0
        while first < len(rows):
            length = rows[first].length
            most = max(1, self._batch_tokens // length) * self._mesh.size
            batch = [row for row in rows[first : first + most] if row.length == length]
            first += len(batch)
            yield batch

    def _start(self, params: Any, batch: list[Row]) -> Any:
        arrays = _arrays(batch, devices=self._mesh.size)
        sharding = NamedSharding(self._mesh, ROWS_SPEC)
        placed = {
            key: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index])  # type: ignore[misc]
            for key, x in arrays.items()
        }
        return self._programs[any(row.branched for row in batch)](params, placed)


def _read(batch: Sequence[Row], answer: Any) -> dict[int, Scored]:
    """Number of a request -> its score."""
    scores = {}
    for row, logprobs_S, greedy_S in zip(batch, *map(np.asarray, answer), strict=False):  # rows of padding follow
        first = 0
        for number, places, _ in row.requests:
            part = slice(first, first + len(places))
            scores[number] = Scored(logprobs_S[part].copy(), bool(np.all(greedy_S[part])))
            first += len(places)
    return scores


def _is_finite(row: Row, scores: Mapping[int, Scored]) -> bool:
    return all(bool(np.all(np.isfinite(scores[number].logprobs))) for number, *_ in row.requests)


def _arrays(batch: Sequence[Row], devices: int) -> dict[str, np.ndarray]:
    """The rows as arrays [B, T] and [B, S]; B and S are powers of two times the devices and LEAST_PLACES."""
    num_rows = devices * _power_of_two(-(-len(batch) // devices))
    num_places = LEAST_PLACES * _power_of_two(-(-max(row.num_scored for row in batch) // LEAST_PLACES))
    length = batch[0].length
    arrays = {name: np.zeros((num_rows, length), np.int32) for name in ("tokens", "positions", "ends", "segments")}
    arrays |= {name: np.zeros((num_rows, num_places), np.int32) for name in ("places", "targets")}
    for number, row in enumerate(batch):
        size = len(row.tokens)
        for name in ("tokens", "positions", "ends", "segments"):
            arrays[name][number, :size] = getattr(row, name)
        scored = row.num_scored
        arrays["places"][number, :scored] = np.concatenate([places for _, places, _ in row.requests])
        arrays["targets"][number, :scored] = [target for _, _, targets in row.requests for target in targets]
    return arrays


def _power_of_two(number: int) -> int:
    return 1 << math.ceil(math.log2(number))


def _program(model: ModelConfig, execution: ExecutionConfig, mesh: Mesh, *, branched: bool) -> Callable[..., Any]:
    """(params, arrays) -> log-probabilities and whether each target is the most likely, [B, S], on every device."""
    graphdef = decoder.graphdef(model)
    gather = make_gather(decoder.logical_axes(model), Collectives.of(mesh, execution))

    def local(params: Any, arrays: Any) -> tuple[jax.Array, jax.Array]:
        if branched:
            attend = tree_attention(arrays["ends"])
        else:
            attend = attention.select_for(
                mesh.devices.flat[0],
                "auto",
                dtype=execution.compute_dtype,
                document_masking=True,  # rows hold several sequences
                sequence_length=arrays["tokens"].shape[1],
                head_dim=model.head_dim,
            )
        hidden_BTD, head_VD = nnx.merge(graphdef, params)(
            arrays["tokens"], arrays["segments"], positions_BT=arrays["positions"], gather=gather, attend=attend
        )
        hidden_BSD = jnp.take_along_axis(hidden_BTD, arrays["places"][:, :, None], axis=1)
        return target_logprobs(hidden_BSD, head_VD, arrays["targets"], chunk=execution.loss_chunk_tokens)

    specs = partition_specs(decoder.param_specs(model))
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, ROWS_SPEC), out_specs=(ROWS_SPEC, ROWS_SPEC), check_vma=False
    )
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(sharded, out_shardings=(whole, whole))


def target_logprobs(
    hidden_BSD: jax.Array, head_VD: jax.Array, targets_BS: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Log p(target), float32 [B, S], and whether it is the most likely token, bool [B, S].

    Logits of at most `chunk` places exist at once.
    """
    B, S, D = hidden_BSD.shape
    chunk = min(chunk, B * S)
    padding = -(B * S) % chunk
    hidden_NCD = jnp.pad(hidden_BSD.reshape(-1, D), ((0, padding), (0, 0))).reshape(-1, chunk, D)
    targets_NC = jnp.pad(targets_BS.reshape(-1), (0, padding)).reshape(-1, chunk)

    def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_CD, targets_C = part
        logits_CV = linear(hidden_CD, head_VD).astype(jnp.float32)
        chosen_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1)[:, 0]
        return chosen_C - jax.nn.logsumexp(logits_CV, axis=-1), jnp.argmax(logits_CV, axis=-1) == targets_C

    logprobs, greedy = jax.lax.map(score, (hidden_NCD, targets_NC))
    return logprobs.reshape(-1)[: B * S].reshape(B, S), greedy.reshape(-1)[: B * S].reshape(B, S)
