"""L2 norms of gradients, parameters and updates by group of parameters: which part of the model moves, and how much.

Groups are the embedding, the head where it is not tied to it, all norms, and attention and MLP of at most 8 ranges of
layers. Their squares are summed where the shards are, and over devices in one reduction of a few hundred bytes.

Shapes: L layers, G groups.
"""

from collections.abc import Mapping
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from tlite_jax.config import ModelConfig
from tlite_jax.model.decoder import Params, param_specs
from tlite_jax.sharding import SHARDS, partition_specs

KINDS = ("gradient", "parameter", "update")
_MOST_RANGES = 8
_MLP = ("gate", "up", "down")


def group_names(model: ModelConfig) -> tuple[str, ...]:
    """The groups: embedding, attention.00-03, ..., mlp.00-03, ..., norms and head."""
    layers = [f"{kind}.{name}" for kind in ("attention", "mlp") for name in _ranges(model.num_hidden_layers)]
    return ("embedding", *layers, "norms", *(() if model.tie_word_embeddings else ("head",)))


def group_norms(model: ModelConfig, mesh: Mesh, gradients: Params, params: Params, changes: Params) -> jax.Array:
    """Norms of sharded arrays, under `jax.jit`.

    Args:
      model: the shape.
      mesh: of the arrays.
      gradients, params, changes: of stored, sharded parameters, whose padding is zero. The changes as such: XLA would
        keep a copy of the old parameters to take new ones from.

    Returns:
      [3, G] float32, as in KINDS and `group_names`.
    """
    specs = partition_specs(param_specs(model))

    def local(*trees: Params) -> jax.Array:
        return jnp.sqrt(jax.lax.psum(jnp.stack([_squares(model, tree) for tree in trees]), SHARDS))

    with jax.named_scope("group_norms"):
        return jax.shard_map(local, mesh=mesh, in_specs=(specs,) * 3, out_specs=PartitionSpec(), check_vma=False)(
            gradients, params, changes
        )


def named_norms(model: ModelConfig, norms: np.ndarray) -> Mapping[str, float]:
    """What `group_norms` gives, by the names that are logged: group_gradient_norm/embedding and so on."""
    groups = group_names(model)
    return {
        f"group_{kind}_norm/{group}": value
        for kind, values in zip(KINDS, norms.tolist(), strict=True)
        for group, value in zip(groups, values, strict=True)
    }


def _squares(model: ModelConfig, params: Params) -> jax.Array:
    """Sums of squares of shards by group, [G]."""
    found = {name: jnp.sum(jnp.square(leaf)) for name, leaf in params.items() if name != "blocks"}
    found["norms"] = found.pop("final_norm")
    ranges = _ranges(model.num_hidden_layers)
    for name, leaf in params["blocks"].items():
        squares_L = jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim)))
        if name.endswith("_norm"):
            found["norms"] += jnp.sum(squares_L)
            continue
        for place, layers in ranges.items():
            group = f"{'mlp' if name in _MLP else 'attention'}.{place}"
            found[group] = found.get(group, 0.0) + jnp.sum(squares_L[layers])
    return jnp.stack([found[name] for name in group_names(model)])


def _ranges(num_layers: int) -> dict[str, slice]:
    """At most 8 ranges of layers, as even as they can be, by names that sort: 00-03, or 0 for one alone."""
    count, width = min(_MOST_RANGES, num_layers), len(str(num_layers - 1))
    ends = [num_layers * number // count for number in range(count + 1)]
    return {
        f"{first:0{width}}" + (f"-{end - 1:0{width}}" if end - first > 1 else ""): slice(first, end)
        for first, end in pairwise(ends)
    }
