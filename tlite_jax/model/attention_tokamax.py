"""Attention kernels of tokamax, an optional library: Triton (Ampere and later) and Mosaic (Hopper and later).

Its public function has no segment ids, so documents travel as a boolean mask of [B, 1, T, T], a byte an entry. Its own
vjp would keep that mask and copies of q, k and v in a rematerialised block; ours keeps what the backward needs and
makes the mask anew.

Shapes: B batch, T tokens, N heads, K kv heads, H head_dim.
"""

from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from tlite_jax.errors import UserError, require
from tlite_jax.model.attention_remat import ATTENDED

_IMPLEMENTATIONS = {"tokamax_triton": "triton", "tokamax_mosaic": "mosaic_gpu"}
_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, Any]


def tokamax_triton(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """Tokamax's flash attention in Triton, for both masks; with documents memory grows as T^2 bytes a sequence.

    Raises:
      UserError: when tokamax is not installed, or is a version that this is not written for.
    """
    return _attend("tokamax_triton", q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def tokamax_mosaic(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """The same in Mosaic, for Hopper and later."""
    return _attend("tokamax_mosaic", q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def require_tokamax(name: str) -> tuple[Any, Any]:
    """Tokamax's operator for a backend, and its type of masks.

    Raises:
      UserError: when tokamax is not installed, or is a version that this is not written for.
    """
    require("tokamax", extra="tokamax", purpose=f"execution.attention={name}")
    flags = require("absl.flags", extra="tokamax", purpose=f"execution.attention={name}")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # tokamax would parse our command line, and end on its first option
    try:
        from tokamax._src.ops.attention import api, base

        return api.IMPLEMENTATIONS[_IMPLEMENTATIONS[name]], base.Mask
    except (ImportError, AttributeError, KeyError) as error:
        raise UserError(
            f"execution.attention={name} does not know this version of tokamax ({error}): pip install "
            "'tokamax==0.0.12', or use auto"
        ) from error


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    name: str, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    return _forward(name, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)[0]


def _forward(
    name: str, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None
) -> tuple[jax.Array, _Residuals]:
    operator, mask_type = require_tokamax(name)
    mask = mask_type(_document_mask(segment_ids_BT), is_causal=True)
    results = operator(q_BTNH, k_BTKH, v_BTKH, mask=mask, return_residuals=True)
    attended_BTNH, statistics = (checkpoint_name(result, ATTENDED) for result in results)
    return attended_BTNH, (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, attended_BTNH, statistics)


def _backward(name: str, residuals: _Residuals, d_attended_BTNH: jax.Array) -> tuple[Any, ...]:
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, attended_BTNH, statistics = residuals
    operator, mask_type = require_tokamax(name)
    mask = mask_type(_document_mask(segment_ids_BT), is_causal=True)
    bound = operator.bind(q_BTNH, k_BTKH, v_BTKH, mask=mask).arguments
    arguments = {key: value for key, value in bound.items() if key != "return_residuals"}
    gradients = operator.vjp(statistics, attended_BTNH, d_attended_BTNH, **arguments)
    return gradients["q"], gradients["k"], gradients["v"], None


_attend.defvjp(_forward, _backward)


def _document_mask(segment_ids_BT: jax.Array | None) -> jax.Array | None:
    """[B, 1, T, T] bool: query t may see key s; None when all are one document."""
    if segment_ids_BT is None:
        return None
    return segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
