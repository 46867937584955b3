"""The layers forward and backward, with the collectives of FSDP hybrid shard where they cost nothing.

A layer computes with weights gathered over `fsdp` while its neighbour computed. Backward is a pipeline of three
stages: while one layer's gradients are computed, those of the layer before are reduce-scattered over `fsdp`, and, in
a step's last microbatch, those of the layer before that are summed over `replica`. So no matrix product waits for
the network, and at most two layers' weights exist whole. It runs on each device, under `shard_map`.

Shapes: B sequences of a microbatch, T tokens, D embed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tlite_jax.config import ModelConfig
from tlite_jax.model import decoder
from tlite_jax.model.attention import Attend
from tlite_jax.model.layers import Product
from tlite_jax.model.remat import remat
from tlite_jax.sharding import Collectives
from tlite_jax.zeros import zeros_after

Tree = Any  # a nested dict of arrays, or of shards of them


class Sum(NamedTuple):
    """Shards of a sum of gradients, float32, and what sharding knows of each."""

    shards: Tree
    specs: Tree


class Forward(NamedTuple):
    """What the forward pass hands to the backward pass.

    Attributes:
      saved: of every layer, stacked, what its backward pass needs but for weights (a `jax.vjp` without them).
      weights: the last layer's, whole.
      constants: the layers' arguments that are the same for all.
    """

    saved: Any
    weights: Tree
    constants: tuple[Any, ...]

    def pull(self, layer: Any, weights: Tree, dx_BTD: jax.Array) -> tuple[Tree, jax.Array]:
        """Gradients of a layer's weights and of its input."""
        vjp = _index(self.saved, layer)
        vjp.args_res[0], vjp.args_res[2:] = weights, list(self.constants)
        return vjp(dx_BTD)[:2]


@dataclass(frozen=True)
class Layers:
    """The decoder's blocks on one device of a mesh.

    Attributes:
      model: the shape.
      collectives: of the mesh.
      attend: attention.
      product: how matrices are multiplied.
      remat: a name that `model.remat` knows.
    """

    model: ModelConfig
    collectives: Collectives
    attend: Attend
    product: Product
    remat: str

    @jax.named_scope("layers")
    def forward(
        self, blocks: Tree, x_BTD: jax.Array, rope: Any, segment_ids_BT: jax.Array | None
    ) -> tuple[jax.Array, Forward]:
        """Runs all layers.

        Args:
          blocks: float32 shards, layers stacked.
          x_BTD: [B, T, D] in the compute dtype.
          rope: from `decoder.rope_at`.
          segment_ids_BT: [B, T] int32 or None.

        Returns:
          x after the last layer, and what `backward` needs.
        """
        top, apply = self.model.num_hidden_layers - 1, self._apply()

        def one(x_BTD: jax.Array, weights: Tree, layer: Any) -> tuple[jax.Array, Tree, Any]:
            """Gives x after a layer, the next layer's weights, and what the backward pass needs of this one."""
            if self._is_alone:
                weights, following = self._gather(blocks, layer), None
            else:
                # After the last layer its own weights again: the backward pass begins with them.
                following = self._gather(blocks, jnp.minimum(layer + 1, top))
            vjp: Any
            x_BTD, vjp = jax.vjp(apply, weights, x_BTD, rope, segment_ids_BT)
            # It keeps its arguments, of which only x is worth it: the others are at hand in the backward pass.
            vjp.args_res[0], vjp.args_res[2:] = None, [None, None]
            return x_BTD, following, vjp

        weights = None if self._is_alone else self._gather(blocks, 0)
        traced, shapes = jax.make_jaxpr(one, return_shape=True)(x_BTD, weights, 0)
        leaves, structure = jax.tree.flatten(shapes[2])
        # What is offloaded the scan stacks itself: in host memory, where nothing needs to be spared.
        is_here = [aval.memory_space == jax.memory.Space.Device for aval in traced.out_avals[-len(leaves) :]]

        def body(carry: tuple, layer: jax.Array) -> tuple[tuple, list[jax.Array]]:
            x_BTD, weights, stacks = carry
            x_BTD, weights, saved = one(x_BTD, weights, layer)
            here, offloaded = _partition(is_here, jax.tree.leaves(saved))
            return (x_BTD, weights, _update(stacks, layer, here)), offloaded

        x_BTD, stacks = zeros_after(
            x_BTD, [jax.ShapeDtypeStruct((top + 1, *of.shape), of.dtype) for of in _partition(is_here, leaves)[0]]
        )
        (x_BTD, weights, stacks), offloaded = jax.lax.scan(body, (x_BTD, weights, stacks), jnp.arange(top + 1))
        parts = iter(stacks), iter(offloaded)
        saved = jax.tree.unflatten(structure, [next(parts[0] if here else parts[1]) for here in is_here])
        return x_BTD, Forward(saved, weights, (rope, segment_ids_BT))

    @jax.named_scope("layers_backward")
    def backward(
        self, blocks: Tree, sums: Tree, head: Sum, dhead: Tree, forward: Forward, dx_BTD: jax.Array, *, last: bool
    ) -> tuple[jax.Array, Tree, Tree]:
        """Runs all layers backward and adds their gradients to sums; the head's enter the pipeline before them.

        Args:
          blocks: as for `forward`.
          sums: float32 shards of gradients, layers stacked.
          head: sums of gradients of what follows the layers.
          dhead: its whole gradients of this microbatch.
          forward: from `forward`.
          dx_BTD: the gradient of the last layer's output.
          last: whether the sums are complete with this microbatch, to be summed over replicas.

        Returns:
          The gradient of the first layer's input, the new sums, and the head's.
        """
        if self._is_alone:
            dx_BTD, sums = self._backward_alone(blocks, sums, forward, dx_BTD)
            return dx_BTD, sums, self.collectives.accumulate(head.shards, dhead, head.specs)
        top = self.model.num_hidden_layers - 1
        collectives, specs = self.collectives, decoder.block_specs(self.model)
        over_replicas = last and collectives.num_replicas > 1

        def body(carry: tuple, layer: Any, *, num_behind: int = 2, gathers: bool = True) -> tuple[tuple, None]:
            """One layer's backward pass, with `num_behind` layers in the pipeline behind it."""
            dx_BTD, weights, gradients, sums = carry
            preceding = self._gather(blocks, layer - 1) if gathers else None
            # Read behind a barrier: XLA would fuse reading with later writing, and copy all sums to make that safe.
            incomplete, complete = jax.lax.optimization_barrier((_index(sums, layer + 1), _index(sums, layer + 2)))
            if num_behind > 1 and over_replicas:
                sums = _update(sums, layer + 2, collectives.sum_replicas(complete))
            if num_behind > 0:
                sums = _update(sums, layer + 1, collectives.accumulate(incomplete, gradients, specs))
            gradients, dx_BTD = forward.pull(layer, weights, dx_BTD)
            return (dx_BTD, preceding, gradients, sums), None

        def reduce_head(stage: int, head_sums: Tree, dx_BTD: jax.Array) -> tuple[Tree, jax.Array]:
            """The head's part of a stage. The barrier holds it there: XLA would rather keep dhead to the end."""
            if stage == 0:
                head_sums = collectives.accumulate(head_sums, dhead, head.specs)
            elif over_replicas:
                head_sums = collectives.sum_replicas(head_sums)
            return jax.lax.optimization_barrier((head_sums, dx_BTD))

        # The upper layers fill the pipeline; the bottom one has none below it to gather.
        num_filling = min(2 if over_replicas else 1, top)
        carry, head_sums = (dx_BTD, forward.weights, None, sums), head.shards
        for stage in range(num_filling):
            carry, _ = body(carry, top - stage, num_behind=stage)
            head_sums, dx_BTD = reduce_head(stage, head_sums, carry[0])
            carry = dx_BTD, *carry[1:]
        if num_filling < top:
            carry, _ = jax.lax.scan(body, carry, jnp.arange(top - num_filling, 0, -1))
        (dx_BTD, _, gradients, sums), _ = body(carry, 0, num_behind=min(top, 2), gathers=False)
        for stage in range(num_filling, 2):
            head_sums, dx_BTD = reduce_head(stage, head_sums, dx_BTD)
        sums = _update(sums, 0, collectives.accumulate(_index(sums, 0), gradients, specs))
        for layer in range(min(top, 1), -1, -1) if over_replicas else ():
            sums = _update(sums, layer, collectives.sum_replicas(_index(sums, layer)))
        return dx_BTD, sums, head_sums

    @property
    def _is_alone(self) -> bool:
        """On one device there is nothing to wait for, and carrying weights and gradients along would copy them."""
        return self.collectives.num_shards == self.collectives.num_replicas == 1

    def _backward_alone(self, blocks: Tree, sums: Tree, forward: Forward, dx_BTD: jax.Array) -> tuple[jax.Array, Tree]:
        specs = decoder.block_specs(self.model)

        def body(carry: tuple[jax.Array, Tree], layer: jax.Array) -> tuple[tuple[jax.Array, Tree], None]:
            dx_BTD, sums = carry
            gradients, dx_BTD = forward.pull(layer, self._gather(blocks, layer), dx_BTD)
            return (
                dx_BTD,
                _update(sums, layer, self.collectives.accumulate(_index(sums, layer), gradients, specs)),
            ), None

        carry, _ = jax.lax.scan(body, (dx_BTD, sums), jnp.arange(self.model.num_hidden_layers - 1, -1, -1))
        return carry

    def _apply(self) -> Callable[..., jax.Array]:
        """(weights, x, rope, segment ids) -> x of one layer."""
        graphdef = decoder.block_graphdef(self.model)

        def apply(weights: Tree, x_BTD: jax.Array, rope: Any, segment_ids_BT: jax.Array | None) -> jax.Array:
            return nnx.merge(graphdef, weights)(x_BTD, rope, segment_ids_BT, attend=self.attend, product=self.product)

        return remat(apply, self.remat)

    def _gather(self, blocks: Tree, layer: jax.Array | int) -> Tree:
        return self.collectives.gather(_index(blocks, layer), decoder.block_specs(self.model))


def _partition(wanted: list[bool], leaves: list) -> tuple[list, list]:
    """Those that are wanted, and the others."""
    return [x for x, want in zip(leaves, wanted, strict=True) if want], [
        x for x, want in zip(leaves, wanted, strict=True) if not want
    ]


def _index(stacked: Tree, layer: Any) -> Tree:
    """One layer of a stack."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stacked)


def _update(stacked: Tree, layer: Any, values: Tree) -> Tree:
    """The stack with one layer replaced."""
    return jax.tree.map(lambda leaf, value: jax.lax.dynamic_update_index_in_dim(leaf, value, layer, 0), stacked, values)
