"""Causal grouped-query attention: one call, several backends.

Which backend for which machine and mask, and what each was tested with: docs/attention.md.

Shapes: B batch, T tokens, N heads, K kv heads, H head_dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import jax

from tlite_jax.errors import UserError
from tlite_jax.model.attention_flops import backward_flops, forward_flops
from tlite_jax.model.attention_kernels import KERNEL_ROWS, cudnn, pallas_triton, splash
from tlite_jax.model.attention_remat import ATTENDED, is_kernel, keep_kernels
from tlite_jax.model.attention_tokamax import require_tokamax, tokamax_mosaic, tokamax_triton
from tlite_jax.model.attention_xla import masked_attention, xla, xla_chunked

__all__ = [
    "ATTENDED",
    "BACKENDS",
    "Attend",
    "backend_name",
    "backward_flops",
    "forward_flops",
    "is_kernel",
    "keep_kernels",
    "masked_attention",
    "select",
    "select_for",
    "xla",
    "xla_chunked",
]


class Attend(Protocol):
    """The hook through which the model attends."""

    def __call__(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None, /
    ) -> jax.Array:
        """Returns [B, T, N, H]; query t sees keys s <= t of its own segment (of all, when segment ids are None).

        The result, and what the backward pass needs besides q, k and v, is named ATTENDED or is that of a kernel that
        `is_kernel` knows.
        """


BACKENDS: Mapping[str, Attend] = {
    "xla": xla,
    "xla_chunked": xla_chunked,
    "cudnn": cudnn,
    "pallas_triton": pallas_triton,
    "tokamax_triton": tokamax_triton,
    "tokamax_mosaic": tokamax_mosaic,
    "splash": splash,
}


@dataclass(frozen=True)
class _Limits:
    """Where a kernel works. `platform` is gpu (NVIDIA) or tpu; `capability` the least compute capability."""

    platform: str
    capability: float = 0.0
    has_documents: bool = True
    has_float32: bool = False
    length_multiple: int = 1
    head_dims: tuple[int, int, int] = (1, 1024, 1)
    """Smallest, largest, and of which it must be a multiple."""


_LIMITS: Mapping[str, _Limits] = {
    "cudnn": _Limits("gpu", capability=8.0, has_documents=False, head_dims=(8, 128, 8)),
    "pallas_triton": _Limits("gpu", capability=8.0, length_multiple=KERNEL_ROWS, head_dims=(16, 128, 16)),
    "tokamax_triton": _Limits("gpu", capability=8.0, head_dims=(16, 128, 16)),
    "tokamax_mosaic": _Limits("gpu", capability=9.0, length_multiple=KERNEL_ROWS, head_dims=(64, 128, 64)),
    "splash": _Limits("tpu", has_float32=True, length_multiple=KERNEL_ROWS),
}
_AUTO = ("cudnn", "pallas_triton", "splash", "xla_chunked")  # in this order, the first that can


@dataclass(frozen=True)
class _Machine:
    platform: str
    capability: float | None
    dtype: str
    document_masking: bool
    sequence_length: int | None
    head_dim: int | None


def select(
    name: str,
    *,
    platform: str,
    dtype: str,
    document_masking: bool,
    sequence_length: int | None = None,
    head_dim: int | None = None,
    compute_capability: str | None = None,
) -> Attend:
    """The backend for `execution.attention`.

    Args:
      name: a key of BACKENDS, or "auto": the fastest that has the mask, the shape and the dtype on this machine.
      platform: of the devices: cpu, gpu or cuda (NVIDIA), tpu.
      dtype: of q, k and v: bfloat16 or float32.
      document_masking: whether there are segment ids.
      sequence_length: tokens of a sequence. While it is not known, auto takes no backend that works only for some.
      head_dim: size of a head; None: assumed to fit.
      compute_capability: of a device of platform gpu, e.g. "8.0"; None: assumed to be enough.

    Raises:
      UserError: when the backend that was asked for cannot do it; names what can.
    """
    capability = None if compute_capability is None else _number(compute_capability)
    platform = "gpu" if platform == "cuda" else platform
    machine = _Machine(platform, capability, dtype, document_masking, sequence_length, head_dim)
    if name == "auto":
        able = (candidate for candidate in _AUTO if _may_choose(candidate, machine))
        return BACKENDS[next(able)]
    reason = _refusal(name, machine)
    if reason:
        raise UserError(f"execution.attention={name} {reason}")
    if name.startswith("tokamax"):
        require_tokamax(name)
    return BACKENDS[name]


def select_for(
    device: jax.Device, name: str, *, dtype: str, document_masking: bool, sequence_length: int, head_dim: int
) -> Attend:
    """`select` for a device, real or described."""
    return select(
        name,
        platform=device.platform,
        dtype=dtype,
        document_masking=document_masking,
        sequence_length=sequence_length,
        head_dim=head_dim,
        compute_capability=getattr(device, "compute_capability", None),
    )


def backend_name(attend: Attend) -> str:
    """The key in BACKENDS of what `select` returned."""
    return next(name for name, backend in BACKENDS.items() if backend is attend)


def _number(compute_capability: str) -> float:
    """0 for what is not NVIDIA's: ROCm's devices are of platform gpu too, and name an architecture here."""
    try:
        return float(compute_capability)
    except ValueError:
        return 0.0


def _may_choose(name: str, machine: _Machine) -> bool:
    if machine.sequence_length is None and name in _LIMITS and _LIMITS[name].length_multiple > 1:
        return False
    return _refusal(name, machine) is None


def _refusal(name: str, machine: _Machine) -> str | None:
    """Why a backend cannot do it and what to do, as the end of a sentence; None when it can."""
    if name not in _LIMITS:
        return None
    limits = _LIMITS[name]
    least, most, multiple = limits.head_dims
    if machine.platform != limits.platform:
        return f"does not run on {machine.platform}, only on {limits.platform}; use auto or xla_chunked"
    if machine.capability is not None and machine.capability < limits.capability:
        return f"needs compute capability {limits.capability}, not {machine.capability}; use auto or xla_chunked"
    if machine.document_masking and not limits.has_documents:
        return "has no document masks; use auto, or data.document_masking=false"
    if machine.dtype == "float32" and not limits.has_float32:
        return "computes in bfloat16: set execution.compute_dtype=bfloat16, or use auto or xla_chunked"
    if machine.sequence_length is not None and machine.sequence_length % limits.length_multiple:
        return (
            f"needs sequences of a multiple of {limits.length_multiple} tokens, not {machine.sequence_length}: "
            "change data.sequence_length, or use auto or xla_chunked"
        )
    if machine.head_dim is not None and (machine.head_dim % multiple or not least <= machine.head_dim <= most):
        return (
            f"needs a head_dim of a multiple of {multiple} from {least} to {most}, not {machine.head_dim}; "
            "use auto or xla_chunked"
        )
    return None
