"""KL(base || now): how far a model has moved from the one it began as, on a fixed sample of held-out text.

The base's next-token distributions are kept as their K most likely tokens and the mass of all others, so that no
second model is in memory. With S those K tokens, p the base's and q today's distribution,

    sum over S of p log(p / q)  +  p(rest) log(p(rest) / q(rest))

is the KL divergence of the two after all other tokens have been made one, which is never more than the whole
divergence (log-sum inequality), and is the whole of it when K is the size of the vocabulary.

Shapes: R rows, B rows at a time, T tokens, D embed, V vocab, K tokens kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tlite_jax.config import ExecutionConfig, ModelConfig
from tlite_jax.data.buckets import HeldOutBucket
from tlite_jax.errors import UserError
from tlite_jax.evaluate.bits_per_byte import NotFiniteError, add_by_owner, require_finite
from tlite_jax.evaluate.forward import make_pass, per_token, rows_at_a_time, run_pass
from tlite_jax.evaluate.rows import Boundaries, Packing, Window
from tlite_jax.loss import IGNORED

FILES = {"ids": np.dtype("<i4"), "logps": np.dtype("<f4"), "rests": np.dtype("<f4")}


class Divergence(NamedTuple):
    """Summed over the sampled tokens of a group."""

    nats: float
    num_tokens: int

    @property
    def per_token(self) -> float:
        """Nats a token."""
        return self.nats / self.num_tokens


@dataclass(frozen=True)
class ReplaySample:
    """The text on which models are compared; `names` are the buckets that it comes from."""

    names: tuple[str, ...]
    packing: Packing


def replay_sample(
    buckets: Sequence[HeldOutBucket], boundaries: Boundaries, *, num_tokens: int, length: int
) -> ReplaySample:
    """The first documents of each bucket, as evenly from all of them as their sizes allow.

    Args:
      buckets: to take from.
      boundaries: marks of a document's start and end.
      num_tokens: of text in all, exactly; the last window of a bucket is cut short to fit.
      length: of a row.

    Raises:
      UserError: the buckets hold less.
    """
    windows = [
        [w for document in bucket.documents for w in boundaries.text_windows(owner, document, length)]
        for owner, bucket in enumerate(buckets)
    ]
    sizes = [sum(len(window.inputs) for window in part) for part in windows]
    if num_tokens > sum(sizes):
        raise UserError(
            f"evaluation.kl.tokens {num_tokens} is more than the {sum(sizes)} held-out tokens of the "
            f"{len(sizes)} buckets that evaluation.kl.select names; lower it or hold more out"
        )
    chosen: list[Window] = []
    for part, quota in zip(windows, _even_quotas(sizes, num_tokens), strict=True):
        left = quota
        for window in part:
            if left > 0:
                chosen.append(Window(window.owner, window.inputs[:left], window.targets[:left]))
                left -= len(chosen[-1].inputs)
    return ReplaySample(tuple(bucket.name for bucket in buckets), Packing(chosen, length))


def _even_quotas(sizes: Sequence[int], total: int) -> list[int]:
    """At most `sizes`, as even as they can be, adding up to `total`; the first take what does not divide."""
    quotas = [0] * len(sizes)
    left = total
    for rank, number in enumerate(sorted(range(len(sizes)), key=lambda number: sizes[number])):
        quotas[number] = min(sizes[number], left // (len(sizes) - rank))
        left -= quotas[number]
    return quotas


def base_pass(model: ModelConfig, execution: ExecutionConfig, mesh: Mesh, top_k: int) -> Any:
    """The pass that gives ids [B, T, K] int32, their log p [B, T, K] and the log of the rest's mass [B, T], float32."""

    def head(hidden_BTD: jax.Array, head_VD: jax.Array, _: Any) -> dict[str, jax.Array]:
        def kept(hidden_D: jax.Array) -> dict[str, jax.Array]:
            logp_V = _log_softmax(hidden_D, head_VD)
            logp_K, ids_K = jax.lax.top_k(logp_V, top_k)
            return {"ids": ids_K.astype(jnp.int32), "logps": logp_K, "rests": _log_rest(logp_V, ids_K)}

        return per_token(kept, execution.loss_chunk_tokens, hidden_BTD)

    return make_pass(model, execution, mesh, head)


def divergence_pass(model: ModelConfig, execution: ExecutionConfig, mesh: Mesh) -> Any:
    """The pass that gives the divergence of each position, float32 [B, T] in nats, from a base in the batch."""

    def head(hidden_BTD: jax.Array, head_VD: jax.Array, batch: Any) -> jax.Array:
        def nats(hidden_D: jax.Array, ids_K: jax.Array, base_K: jax.Array, base_rest: jax.Array) -> jax.Array:
            logp_V = _log_softmax(hidden_D, head_VD)
            kept = jnp.sum(jnp.exp(base_K) * (base_K - logp_V[ids_K]))
            rest = jnp.exp(base_rest) * (base_rest - _log_rest(logp_V, ids_K))
            return kept + jnp.where(base_rest == -jnp.inf, 0.0, rest)

        parts = hidden_BTD, batch["ids"], batch["logps"], batch["rests"]
        return per_token(nats, execution.loss_chunk_tokens, *parts)

    return make_pass(model, execution, mesh, head)


def _log_softmax(hidden_D: jax.Array, head_VD: jax.Array) -> jax.Array:
    # Logits in float32 whatever the compute dtype: divergences are small differences of them.
    logits_V = jnp.einsum("d,vd->v", hidden_D, head_VD, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits_V)


def _log_rest(logp_V: jax.Array, ids_K: jax.Array) -> jax.Array:
    """Log of the mass outside `ids_K`, summed over what is there and not taken from 1."""
    return jax.nn.logsumexp(logp_V.at[ids_K].set(-jnp.inf))


class DivergenceMeter:
    """Measures KL(base || now) per bucket on a mesh.

    Args:
      model: today's shape.
      execution, mesh, batch_size: as for `Evaluator`.
      sample: what is compared.
      directory: holds, or will hold, the base's distributions, one .npy file of all rows for each of FILES.
    """

    def __init__(
        self,
        model: ModelConfig,
        execution: ExecutionConfig,
        mesh: Mesh,
        *,
        sample: ReplaySample,
        batch_size: int,
        directory: Path,
    ):
        self._mesh, self._sample, self._directory = mesh, sample, directory
        self._batch_size = rows_at_a_time(batch_size, mesh)
        self._execution = execution
        self._nats = divergence_pass(model, execution, mesh)
        self._base: dict[str, np.ndarray] = {}

    def write_base(self, params: Any, model: ModelConfig, top_k: int, *, writes: bool) -> None:
        """Computes the base's distributions and, where `writes` is set (process 0), puts them into the directory.

        Args:
          params: of the base, stored and sharded.
          model: its shape.
          top_k: K.
          writes: whether this process writes.
        """
        rows, length = len(self._sample.packing), self._sample.packing.length
        shapes = {"ids": (rows, length, top_k), "logps": (rows, length, top_k), "rests": (rows, length)}
        files = {}
        if writes:
            self._directory.mkdir(parents=True, exist_ok=True)
            for name, dtype in FILES.items():
                path = self._directory / f"{name}.npy"
                files[name] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shapes[name])
        compiled = base_pass(model, self._execution, self._mesh, top_k)
        size = self._mesh.size  # the results, K numbers a token, are whole on every device
        for first, _, result in run_pass(compiled, params, self._sample.packing, self._mesh, size):
            count = min(size, rows - first)
            for row, kept in enumerate(result["logps"][:count], start=first):
                if not np.isfinite(kept).all():
                    raise NotFiniteError(
                        f"the base's log probabilities in row {row} of the replay sample are not finite"
                    )
            for name, file in files.items():
                file[first : first + count] = result[name][:count]
        for file in files.values():
            file.flush()

    def open_base(self) -> None:
        """Maps what `write_base` wrote into memory."""
        files = {name: self._directory / f"{name}.npy" for name in FILES}
        self._base = {name: np.load(file, mmap_mode="r", allow_pickle=False) for name, file in files.items()}

    def nowhere(self) -> dict[str, Divergence]:
        """What the base itself measures."""
        tokens = np.zeros(len(self._sample.names), np.int64)
        for window in self._sample.packing.windows:
            tokens[window.owner] += np.count_nonzero(window.targets != IGNORED)
        return {
            name: Divergence(0.0, int(tokens[number]))
            for number, name in enumerate(self._sample.names)
            if tokens[number]
        }

    def measure(self, params: Any) -> dict[str, Divergence]:
        """Bucket name -> divergence of stored, sharded parameters from the base.

        Raises:
          NotFiniteError: names the bucket.
        """
        nats, tokens = np.zeros(len(self._sample.names)), np.zeros(len(self._sample.names), np.int64)
        packing = self._sample.packing
        for _, batch, nats_BT in run_pass(self._nats, params, packing, self._mesh, self._batch_size, self._base_rows):
            add_by_owner(nats, tokens, batch.owner, nats_BT)
        require_finite(nats, self._sample.names, "KL(base || now)")
        return {
            name: Divergence(float(nats[number]), int(tokens[number]))
            for number, name in enumerate(self._sample.names)
            if tokens[number]
        }

    def _base_rows(self, first: int, size: int) -> dict[str, np.ndarray]:
        result = {}
        for name, array in self._base.items():
            part = array[first : first + size]
            result[name] = np.pad(part, [(0, size - len(part)), *[(0, 0)] * (part.ndim - 1)])
        return result
