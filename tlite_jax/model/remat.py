"""What a layer keeps for its backward pass, and what it computes again there."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from tlite_jax.model.attention import keep_kernels

_policies = jax.checkpoint_policies


def _offload_dots(primitive: Any, *avals: Any, **params: Any) -> Any:
    if keep_kernels(primitive, *avals, **params):
        return True
    return _policies.offload_dot_with_no_batch_dims("device", "pinned_host")(primitive, *avals, **params)


POLICIES: Mapping[str, Callable[..., Any]] = {
    "full": _policies.nothing_saveable,
    "attention": keep_kernels,
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, keep_kernels),
    "offload": _offload_dots,
}


def remat(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function`, computed again in its backward pass but for what the policy keeps.

    Args:
      function: a layer.
      name: full (keeps nothing but inputs), attention (attention's output), dots (also matrix products: only
        elementwise work is repeated), offload (dots, kept in host memory), none (everything is kept).
    """
    if name == "none":
        return function
    # prevent_cse=False: the barriers would keep gathers of weights from overlapping the recomputation.
    return jax.checkpoint(function, policy=POLICIES[name], prevent_cse=False)
