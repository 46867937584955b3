"""Bits per byte of held-out text: comparable between tokenizers, exact over bytes.

A document's tokens are scored left to right, each given all before it in its window; a token that marks a document's
start or end is context, not text, and is not scored. Nats are summed in float64 on the host, token by token, so that
a score does not depend on the batch size, the mesh or the number of processes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tlite_jax.config import ExecutionConfig, ModelConfig
from tlite_jax.data.buckets import HeldOutBucket
from tlite_jax.evaluate.forward import loss_pass, rows_at_a_time, run_pass
from tlite_jax.evaluate.rows import Boundaries, Packing, choose

Progress = Callable[[int, int], None]


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


@dataclass(frozen=True)
class Sample:
    """The documents of each bucket that are scored, packed once and scored many times."""

    names: tuple[str, ...]
    num_bytes: tuple[int, ...]
    packing: Packing


def make_sample(
    buckets: Sequence[HeldOutBucket],
    boundaries: Boundaries,
    length: int,
    *,
    max_tokens: int | None = None,
    max_bytes: int | None = None,
) -> Sample:
    """Chooses and packs what is scored.

    Args:
      buckets: held-out documents.
      boundaries: marks of a document's start and end.
      length: of a row, and the longest window.
      max_tokens, max_bytes: of each bucket, as for `choose`; None: all.
    """
    windows, num_bytes = [], []
    for owner, bucket in enumerate(buckets):
        documents = choose(bucket, max_tokens, max_bytes)
        num_bytes.append(sum(document.num_bytes for document in documents))
        for document in documents:
            windows += boundaries.text_windows(owner, document, length)
    return Sample(tuple(bucket.name for bucket in buckets), tuple(num_bytes), Packing(windows, length))


class NotFiniteError(FloatingPointError):
    """A score is not a number; says of which bucket."""


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
        self._batch_size = rows_at_a_time(batch_size, mesh)
        self._boundaries = Boundaries(start, end)
        self._losses = loss_pass(model, execution, mesh)

    def score(
        self,
        params: Any,
        buckets: Sequence[HeldOutBucket],
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Score]:
        """Scores every bucket: `score_sample` of `make_sample`."""
        sample = make_sample(buckets, self._boundaries, self._length, max_tokens=max_tokens)
        return self.score_sample(params, sample, progress)

    def score_sample(self, params: Any, sample: Sample, progress: Progress | None = None) -> dict[str, Score]:
        """Scores a sample.

        Args:
          params: stored, sharded parameters.
          sample: from `make_sample`, of rows as long as this evaluator's.
          progress: called with (rows done, rows in all).

        Returns:
          bucket name -> Score.

        Raises:
          NotFiniteError: names the first bucket whose score is not finite.
        """
        nats, tokens = np.zeros(len(sample.names)), np.zeros(len(sample.names), np.int64)
        for first, batch, losses_BT in run_pass(self._losses, params, sample.packing, self._mesh, self._batch_size):
            add_by_owner(nats, tokens, batch.owner, losses_BT)
            if progress is not None:
                progress(min(first + self._batch_size, len(sample.packing)), len(sample.packing))
        require_finite(nats, sample.names, "the loss")
        return {
            name: Score(float(nats[number]), sample.num_bytes[number], int(tokens[number]))
            for number, name in enumerate(sample.names)
        }

    def padding_share(self, sample: Sample) -> float:
        """The share of the computed positions that score nothing."""
        return 1 - sample.packing.num_scored / max(1, self.num_positions(sample))

    def num_positions(self, sample: Sample) -> int:
        """Positions that are computed, padding included."""
        return -(-len(sample.packing) // self._batch_size) * self._batch_size * self._length


def add_by_owner(sums: np.ndarray, counts: np.ndarray, owner_BT: np.ndarray, values_BT: np.ndarray) -> None:
    """Adds each position's value, and 1, to its owner's sum and count, in float64."""
    scored = owner_BT >= 0
    sums += np.bincount(owner_BT[scored], weights=values_BT[scored].astype(np.float64), minlength=len(sums))
    counts += np.bincount(owner_BT[scored], minlength=len(counts))


def require_finite(sums: np.ndarray, names: Sequence[str], what: str) -> None:
    """Raises NotFiniteError for the first sum that is not finite."""
    for value, name in zip(sums, names, strict=True):
        if not math.isfinite(value):
            raise NotFiniteError(f"{what} on held-out bucket {name} is {value}")


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
