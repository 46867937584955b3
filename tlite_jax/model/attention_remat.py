"""What attention keeps for its backward pass when its block is rematerialised.

A fused kernel's backward reads the attended values and the logsumexp of every row. A remat policy that keeps both
(`is_kernel`) never runs the forward kernel twice. Every backend names its results ATTENDED, in the layout in which its
backward reads them, except cuDNN's and Pallas Triton's: the library's own rule hides what happens inside, so their
whole call is recognised instead.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

ATTENDED = "attended"  # checkpoint_name of attention's output and, with it, of what its backward needs besides q, k, v

_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # a primitive of jax.nn.dot_product_attention
_TRITON_FORWARD = "mha"  # the jitted function of jax.experimental.pallas.ops.gpu.attention


def is_kernel(primitive: Any, params: Mapping[str, Any]) -> bool:
    """Whether an equation, as a remat policy sees it, gives what a backward pass of attention would recompute.

    Args:
      primitive: the equation's primitive.
      params: its parameters: `policy(primitive, *avals, **params)`.

    Returns:
      True for the forward of a fused kernel and for values named ATTENDED. Keeping them keeps attended values and
      logsumexps, and no copy of q, k or v.
    """
    if primitive.name == "name":
        return params["name"] == ATTENDED
    if primitive.name == "custom_vjp_call":
        return any(_is_triton_forward(equation) for equation in _equations(params))
    return primitive.name == _CUDNN_FORWARD


def _is_triton_forward(equation: Any) -> bool:
    return equation.primitive.name in ("jit", "pjit") and equation.params["name"] == _TRITON_FORWARD


def _equations(params: Mapping[str, Any]) -> Iterator[Any]:
    for jaxpr in jaxprs_in_params(dict(params)):
        yield from getattr(jaxpr, "jaxpr", jaxpr).eqns


def keep_kernels(primitive: Any, *_: jax.core.AbstractValue, **params: Any) -> bool:
    """`is_kernel` as a remat policy, to be joined with others by `save_from_both_policies`."""
    return is_kernel(primitive, params)
