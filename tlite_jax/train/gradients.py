"""Gradients of a step: forward and backward written out, as one device executes them under `shard_map`.

    for each microbatch:
        embed, layers forward, loss, layers backward (train.layers), the embedding's gradient

The embedding and the head are gathered once each, shards of gradients are summed in float32 in one buffer, and the
last microbatch also sums them over replicas.

Shapes: B sequences of a microbatch, R of all microbatches, T tokens, D embed, V vocab.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tlite_jax.config import ExecutionConfig, ModelConfig
from tlite_jax.loss import cross_entropy_and_gradients, num_scored
from tlite_jax.model import decoder
from tlite_jax.model.attention import Attend
from tlite_jax.model.layers import Product, product, rms_norm
from tlite_jax.sharding import Collectives
from tlite_jax.train.context import local_positions
from tlite_jax.train.layers import Layers, Sum, Tree
from tlite_jax.zeros import zeros_after

Batch = dict[str, jax.Array]  # tokens, targets and, with document masking, segment_ids: [B, T] int32


@dataclass(frozen=True)
class Gradients:
    """Computes gradients of the summed loss on one device of a mesh.

    Attributes:
      model, execution: sections of the run's config.
      collectives: of the mesh.
      attend: attention.
      product: how the layers multiply matrices.
    """

    model: ModelConfig
    execution: ExecutionConfig
    collectives: Collectives
    attend: Attend
    product: Product = product

    def __call__(self, params: Tree, batch: Batch) -> tuple[Tree, jax.Array]:
        """Gradients of all microbatches, summed over all devices.

        Args:
          params: float32 shards.
          batch: the rows of this device; microbatches are consecutive rows.

        Returns:
          Float32 shards of gradients, and of each row of this device its summed loss and its number of scored tokens,
          [R, 2] float32.
        """
        k = self.execution.num_microbatches
        sums = jax.tree.map(jnp.zeros_like, params)
        if k == 1:
            return self._microbatch(params, sums, batch, last=True)
        microbatches = jax.tree.map(lambda x: x.reshape(k, x.shape[0] // k, *x.shape[1:]), batch)
        # The last one is a program of its own only where it has replicas to sum over.
        num_alike = k if self.collectives.num_replicas == 1 else k - 1
        sums, rows_kB2 = jax.lax.scan(
            lambda sums, microbatch: self._microbatch(params, sums, microbatch, last=False),
            sums,
            jax.tree.map(lambda x: x[:num_alike], microbatches),
        )
        if num_alike < k:
            # The barrier has the others end first: two microbatches at once would take the memory of two. And the
            # parameters pass through it, or the last one's gathers would be under way, and take memory, all the while.
            ending = jax.tree.map(lambda x: x[-1], microbatches)
            params, ending, sums = jax.lax.optimization_barrier((params, ending, sums))
            sums, rows_B2 = self._microbatch(params, sums, ending, last=True)
            rows_kB2 = jnp.concatenate([rows_kB2, rows_B2[None]])
        return sums, rows_kB2.reshape(-1, 2)

    def _microbatch(self, params: Tree, gradients: Tree, batch: Batch, *, last: bool) -> tuple[Tree, jax.Array]:
        """Adds one microbatch to the sums, which are complete with the last; also returns what its rows have lost."""
        collectives, specs = self.collectives, decoder.param_specs(self.model)
        layers = Layers(self.model, collectives, self.attend, self.product, self.execution.remat)
        rope = decoder.rope_at(self.model, local_positions(batch["tokens"].shape[1])[None])
        tied = self.model.tie_word_embeddings
        names = ("final_norm",) if tied else ("final_norm", "head")
        head_specs = _only(specs, names)

        embedding_VD = collectives.gather(params["embedding"], specs["embedding"])
        with jax.named_scope("embedding"):
            x_BTD = embedding_VD[batch["tokens"]]
        x_BTD, forward = layers.forward(params["blocks"], x_BTD, rope, batch.get("segment_ids"))
        head = collectives.gather(_only(params, names), head_specs)
        with jax.named_scope("loss"):
            normed_BTD, normed_vjp = jax.vjp(
                lambda x, scale: rms_norm(x, scale, self.model.rms_norm_eps), x_BTD, head["final_norm"]
            )
            losses_BT, (dnormed_BTD, dhead_VD) = cross_entropy_and_gradients(
                normed_BTD,
                embedding_VD if tied else head["head"],
                batch["targets"],
                chunk_tokens=self.execution.loss_chunk_tokens,
            )
            dx_BTD, dfinal_norm = normed_vjp(dnormed_BTD)
            rows_B2 = jnp.stack([jnp.sum(losses_BT, axis=1), num_scored(batch["targets"], axis=1)], axis=1)
        dx_BTD, block_sums, head_sums = layers.backward(
            params["blocks"],
            gradients["blocks"],
            Sum(_only(gradients, names), head_specs),
            _only({"final_norm": dfinal_norm, "head": dhead_VD}, names),
            forward,
            dx_BTD,
            last=last,
        )
        dembedding_VD = dhead_VD
        if not tied:
            dx_BTD, dembedding_VD = zeros_after(dx_BTD, jax.ShapeDtypeStruct(embedding_VD.shape, jnp.float32))
        with jax.named_scope("embedding_backward"):
            dembedding_VD = dembedding_VD.at[batch["tokens"]].add(dx_BTD.astype(jnp.float32))
        embedding_sum = collectives.accumulate(gradients["embedding"], dembedding_VD, specs["embedding"])
        if last:
            embedding_sum = collectives.sum_replicas(embedding_sum)
        return {**head_sums, "blocks": block_sums, "embedding": embedding_sum}, rows_B2


def _only(tree: Tree, names: tuple[str, ...]) -> Tree:
    return {name: tree[name] for name in names}
