"""Matrix products in eight bits: values in e4m3, gradients in e5m2 (Micikevicius et al. 2022, arXiv:2209.05433).

Every array is divided by a scale of its own, taken anew each time from its largest magnitude, so nothing is carried
from step to step. qwix quantises and multiplies; sums are float32, results have the dtype of the input.

Shapes: I inputs, O outputs, M all tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tlite_jax.errors import UserError, require

LEAST_CAPABILITY = 8.9  # Ada; Hopper is 9.0
_PURPOSE = "execution.fp8"


def check_fp8(device: jax.Device) -> None:
    """Raises UserError when products in eight bits would not be faster on a device, or qwix is not installed.

    Args:
      device: real or described. A CPU emulates them, for tests.
    """
    if device.platform not in ("gpu", "cuda", "cpu"):
        raise UserError(f"execution.fp8 is for NVIDIA GPUs, not {device.platform}; set execution.fp8=false")
    capability = getattr(device, "compute_capability", None)
    if capability is not None and not _is_enough(capability):
        raise UserError(
            f"execution.fp8 needs compute capability {LEAST_CAPABILITY} (Ada, Hopper and later), not {capability}; "
            "set execution.fp8=false"
        )
    require("qwix", extra="fp8", purpose=_PURPOSE)


def _is_enough(capability: str) -> bool:
    try:
        return float(capability) >= LEAST_CAPABILITY
    except ValueError:  # ROCm's devices name an architecture
        return False


@jax.custom_vjp
def fp8_product(x: jax.Array, weight_OI: jax.Array) -> jax.Array:
    """`layers.product` in eight bits: x [..., I] @ weight^T, [..., O] in x's dtype, as are the gradients.

    Raises:
      UserError: when qwix is not installed.
    """
    return _forward(x, weight_OI)[0]


def _forward(x: jax.Array, weight_OI: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # As in `layers`: the product is here, where rematerialisation policies see it. Eight-bit copies are not kept.
    qwix = require("qwix", extra="fp8", purpose=_PURPOSE)
    contracted = (x.ndim - 1,), (1,)
    return qwix.dot_general(_values(x), _values(weight_OI), (contracted, ((), ()))), (x, weight_OI)


def _backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    qwix = require("qwix", extra="fp8", purpose=_PURPOSE)
    x, weight_OI = residuals
    dy_MO = _quantize(dy.reshape(-1, dy.shape[-1]), jnp.float8_e5m2)
    dx_MI = qwix.dot_general(dy_MO, _values(weight_OI), (((1,), (0,)), ((), ())))
    dweight_OI = qwix.dot_general(dy_MO, _values(x.reshape(-1, x.shape[-1])), (((0,), (0,)), ((), ())))
    return dx_MI.reshape(x.shape), dweight_OI


fp8_product.defvjp(_forward, _backward)


def _values(array: jax.Array) -> Any:
    return _quantize(array, jnp.float8_e4m3fn)


def _quantize(array: jax.Array, dtype: Any) -> Any:
    qwix = require("qwix", extra="fp8", purpose=_PURPOSE)
    return qwix.quantize(array, dtype, channelwise_axes=(), calibration_method="absmax")
