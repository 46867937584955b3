"""Fused attention kernels that jax brings along: cuDNN and Pallas Triton for NVIDIA, splash for TPU.

Shapes: B batch, T tokens, N heads, K kv heads, H head_dim.
"""

import jax
import jax.numpy as jnp

from tlite_jax.errors import UserError
from tlite_jax.model.attention_remat import ATTENDED

KERNEL_ROWS = 128  # tokens; the kernels of Pallas divide a sequence into multiples of it
# The larger side of a block of Pallas Triton, forward and backward; the other is half of it. With eight warps none
# spills registers on an A100 at head_dim 128; larger ones and the library's own forward blocks do (docs/attention.md).
TRITON_FORWARD_BLOCK, TRITON_BACKWARD_BLOCK, TRITON_WARPS = 128, 64, 8
SPLASH_LARGEST_BLOCK = 1024


def require_whole_blocks(name: str, length: int) -> None:
    """Raises UserError when a Pallas kernel cannot divide a sequence."""
    if length % KERNEL_ROWS:
        raise UserError(
            f"execution.attention={name} needs sequences of a multiple of {KERNEL_ROWS} tokens, not {length}: "
            "change data.sequence_length, or use auto or xla_chunked"
        )


def cudnn(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """CuDNN's fused causal attention (Ampere and later, bf16 or float16); it has no document masks here.

    Raises:
      UserError: when there are segment ids: with a mask cuDNN also computes its gradient, a T x T array of float32.
    """
    if segment_ids_BT is not None:
        raise UserError("execution.attention=cudnn has no document masks; use auto, pallas_triton or xla_chunked")
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")


def pallas_triton(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Jax's flash attention in Triton, for both masks; memory grows as T. No block is skipped for its documents.

    Args:
      q_BTNH: [B, T, N, H], T a multiple of 128.
      k_BTKH, v_BTKH: [B, T, K, H]; every kv head is repeated N / K times, as the kernel knows no groups.
      segment_ids_BT: [B, T] int32 or None.
      interpret: emulate the kernel, for tests.

    Raises:
      UserError: when T is not a multiple of 128.
    """
    from jax.experimental.pallas.ops.gpu import attention as triton

    T, N, H = q_BTNH.shape[1:]
    require_whole_blocks("pallas_triton", T)
    group = N // k_BTKH.shape[2]
    blocks = triton.BlockSizes(
        block_q=TRITON_FORWARD_BLOCK,
        block_k=TRITON_FORWARD_BLOCK // 2,
        block_q_dkv=TRITON_BACKWARD_BLOCK // 2,
        block_kv_dkv=TRITON_BACKWARD_BLOCK,
        block_q_dq=TRITON_BACKWARD_BLOCK,
        block_kv_dq=TRITON_BACKWARD_BLOCK // 2,
    )
    k_BTNH, v_BTNH = (jnp.repeat(x_BTKH, group, axis=2) for x_BTKH in (k_BTKH, v_BTKH))
    # The kernel's own vjp takes its options by position.
    return triton.mha(
        q_BTNH, k_BTNH, v_BTNH, segment_ids_BT, H**-0.5, True, blocks, "triton", TRITON_WARPS, 2, None, interpret
    )


def splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Jax's splash attention for TPU, for both masks and groups of heads; memory grows as T.

    Args:
      q_BTNH: [B, T, N, H], T a multiple of 128.
      k_BTKH, v_BTKH: [B, T, K, H].
      segment_ids_BT: [B, T] int32 or None.
      interpret: emulate the kernel, for tests.

    Raises:
      UserError: when T is not a multiple of 128.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    T, N, H = q_BTNH.shape[1:]
    require_whole_blocks("splash", T)
    block, keys = splash_blocks(T)
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((T, T))] * N),
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=keys,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )

    def one_sequence(q_NTH: jax.Array, k_KTH: jax.Array, v_KTH: jax.Array, segments_T: jax.Array | None) -> jax.Array:
        segments = None if segments_T is None else splash_attention.SegmentIds(segments_T, segments_T)
        return kernel(q_NTH, k_KTH, v_KTH, segments)

    scaled_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)  # the kernel does not scale
    q_BNTH, k_BKTH, v_BKTH = (x.transpose(0, 2, 1, 3) for x in (scaled_BTNH, k_BTKH, v_BTKH))
    return jax.vmap(one_sequence)(q_BNTH, k_BKTH, v_BKTH, segment_ids_BT).transpose(0, 2, 1, 3)


def splash_blocks(length: int) -> tuple[int, int]:
    """Tokens of a block of `splash`, forward and for queries backward, and those of keys backward, powers of two.

    Backward each block of keys writes its part of every query's gradient, to be summed after: at most eight of them
    where the length allows, so that their memory grows as the length.
    """
    divisor = length & -length
    block = min(SPLASH_LARGEST_BLOCK, divisor)
    return block, min(max(block, length // 8), divisor)
