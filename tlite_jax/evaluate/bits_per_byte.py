"""Bits per byte of held-out text: comparable between tokenizers, exact over bytes.

A document's tokens are scored left to right, each given all before it in its window; a token that marks a document's
start or end is context, not text, and is not scored. Windows of several documents share a row behind a document mask,
so short documents cost what they are long.

Shapes: B rows, T tokens, R rows in all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tlite_jax.config import ExecutionConfig, ModelConfig
from tlite_jax.data.buckets import HeldOutBucket, HeldOutDocument
from tlite_jax.loss import IGNORED, token_losses
from tlite_jax.model import attention, decoder
from tlite_jax.sharding import ROWS_SPEC, Collectives, make_gather, partition_specs

Rows = dict[str, np.ndarray]  # tokens, targets, segment_ids: [R, T] int32


@dataclass(frozen=True)
class Score:
    """Summed over a group of documents."""

    nats: float
    num_bytes: int
    num_tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Nats / ln 2 / bytes."""
        return self.nats / math.log(2) / self.num_bytes

    def __add__(self, other: "Score") -> "Score":
        """Both groups together."""
        return Score(self.nats + other.nats, self.num_bytes + other.num_bytes, self.num_tokens + other.num_tokens)


class Evaluator:
    """Scores held-out buckets with a compiled forward pass, sharded over a mesh.

    Args:
      model: shape of the model.
      execution: dtype, attention and chunking; remat does not matter.
      mesh: from `make_mesh`.
      sequence_length: T, the window.
      batch_size: rows at a time, over all devices; rounded up to a multiple of the devices.
      start, end: ids that mark a document's boundaries, or None; where there is no start, `end` stands before a
        document's first token, as it does in training.
    """

    def __init__(
        self,
        model: ModelConfig,
        execution: ExecutionConfig,
        mesh: Mesh,
        *,
        sequence_length: int,
        batch_size: int,
        start: int | None,
        end: int | None,
    ):
        self._mesh = mesh
        self._length = sequence_length
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._start, self._end = start, end
        self._row_losses = _row_losses_fn(model, execution, mesh)

    def score(
        self,
        params: Any,
        buckets: Sequence[HeldOutBucket],
        max_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Score]:
        """Scores every bucket.

        Args:
          params: stored, sharded parameters.
          buckets: held-out documents.
          max_tokens: of each bucket, in whole documents (at least one, the shortest); None: all.
          progress: called with (rows done, rows in all).

        Returns:
          bucket name -> Score.
        """
        if not buckets:
            return {}
        packed = {bucket.name: self._pack(bucket.documents, max_tokens) for bucket in buckets}
        rows = {
            key: np.concatenate([rows[key] for rows, _ in packed.values()])
            for key in ("tokens", "targets", "segment_ids")
        }
        losses_R = self._losses(params, rows, progress)
        scores, first = {}, 0
        for name, (part, num_bytes) in packed.items():
            last = first + len(part["tokens"])
            nats = float(np.sum(losses_R[first:last], dtype=np.float64))
            scores[name] = Score(nats, num_bytes, int(np.sum(part["targets"] != IGNORED)))
            first = last
        return scores

    def _losses(self, params: Any, rows: Rows, progress: Callable[[int, int], None] | None) -> np.ndarray:
        total = len(rows["tokens"])
        padding = -total % self._batch_size
        padded = {
            key: np.pad(x, ((0, padding), (0, 0)), constant_values=IGNORED if key == "targets" else 0)
            for key, x in rows.items()
        }
        sharding = NamedSharding(self._mesh, ROWS_SPEC)
        losses = []
        for first in range(0, total + padding, self._batch_size):
            part = {key: x[first : first + self._batch_size] for key, x in padded.items()}
            batch = {
                key: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index])  # type: ignore[misc]
                for key, x in part.items()
            }
            losses.append(np.asarray(self._row_losses(params, batch)))
            if progress is not None:
                progress(min(first + self._batch_size, total), total)
        return np.concatenate(losses)[:total]

    def _pack(self, documents: Sequence[HeldOutDocument], max_tokens: int | None) -> tuple[Rows, int]:
        """Windows of documents, dealt into rows first-fit in falling length; and the bytes of their text."""
        windows: list[tuple[np.ndarray, np.ndarray]] = []
        chosen = documents if max_tokens is None else _within(documents, max_tokens)
        for document in chosen:
            windows += self._windows(document.tokens.astype(np.int32))
        return _first_fit(windows, self._length), sum(document.num_bytes for document in chosen)

    def _windows(self, tokens: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(inputs, targets) pairs that score each text token of a document once."""
        if self._end is not None and len(tokens) and tokens[-1] == self._end:
            tokens = tokens[:-1]
        if self._start is None:
            # Without any boundary token the first token has no context and cannot be scored: it stands for itself.
            tokens = np.concatenate([[tokens[0] if self._end is None else self._end], tokens]).astype(np.int32)
        inputs, targets = tokens[:-1], tokens[1:]
        return [
            (inputs[first : first + self._length], targets[first : first + self._length])
            for first in range(0, len(inputs), self._length)
        ]


def combine(scores: Mapping[str, Score], buckets: Sequence[HeldOutBucket], label: str) -> dict[str, Score]:
    """Adds up the scores of buckets that share a label's value; never-trained buckets are left out."""
    result: dict[str, Score] = {}
    for bucket in buckets:
        value = bucket.labels.get(label)
        if value is not None and not bucket.never_trained:
            score = scores[bucket.name]
            result[value] = result[value] + score if value in result else score
    return result


def by_name(scores: Mapping[str, Score], buckets: Sequence[HeldOutBucket]) -> dict[str, Score]:
    """Every bucket's score, and every language's under "language=VALUE"."""
    languages = combine(scores, buckets, "language")
    return {**scores, **{f"language={value}": score for value, score in sorted(languages.items())}}


def _within(documents: Sequence[HeldOutDocument], max_tokens: int) -> list[HeldOutDocument]:
    """The documents that fit into a budget, in order, those too long for what is left passed over."""
    chosen: list[HeldOutDocument] = []
    left = max_tokens
    for document in documents:
        if len(document.tokens) <= left:
            chosen.append(document)
            left -= len(document.tokens)
    return chosen or sorted(documents, key=lambda document: len(document.tokens))[:1]


def _first_fit(windows: list[tuple[np.ndarray, np.ndarray]], length: int) -> Rows:
    windows = sorted(windows, key=lambda window: -len(window[0]))
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
    room: list[int] = []
    for window in windows:
        size = len(window[0])
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            rows.append([window])
            room.append(length - size)
        else:
            rows[place].append(window)
            room[place] -= size
    result = {
        "tokens": np.zeros((len(rows), length), np.int32),
        "targets": np.full((len(rows), length), IGNORED, np.int32),
        "segment_ids": np.zeros((len(rows), length), np.int32),
    }
    for row, members in enumerate(rows):
        first = 0
        for segment, (inputs, targets) in enumerate(members, start=1):
            span = slice(first, first + len(inputs))
            result["tokens"][row, span], result["targets"][row, span] = inputs, targets
            result["segment_ids"][row, span] = segment
            first += len(inputs)
    return result


def _row_losses_fn(model: ModelConfig, execution: ExecutionConfig, mesh: Mesh) -> Callable[[Any, Any], jax.Array]:
    """(params, batch) -> summed nats of each row, float32 [B], on every device."""
    graphdef = decoder.graphdef(model)
    gather = make_gather(decoder.logical_axes(model), Collectives.of(mesh, execution))

    def local(params: Any, batch: Any) -> jax.Array:
        attend = attention.select_for(
            mesh.devices.flat[0],
            "auto",
            dtype=execution.compute_dtype,
            document_masking=True,  # rows hold several documents
            sequence_length=batch["tokens"].shape[1],
            head_dim=model.head_dim,
        )
        hidden_BTD, head_VD = nnx.merge(graphdef, params)(
            batch["tokens"], batch["segment_ids"], gather=gather, attend=attend
        )
        losses_BT = token_losses(hidden_BTD, head_VD, batch["targets"], chunk_tokens=execution.loss_chunk_tokens)
        return jnp.sum(losses_BT, axis=1)

    specs = partition_specs(decoder.param_specs(model))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(specs, ROWS_SPEC), out_specs=ROWS_SPEC, check_vma=False)
    return jax.jit(sharded, out_shardings=NamedSharding(mesh, PartitionSpec()))
