"""FLOPs of attention, against the products in the program and the blocks that kernels say they visit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import matmul_flops, with_gradients

from tlite_jax.model import attention

B, N, K, H = 2, 8, 2, 64


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("backend", "length"), [("xla", 384), ("xla_chunked", 300), ("xla_chunked", 4096)])
def test_xla_counts_the_products_of_its_program(backend, length, documents):
    attend = attention.BACKENDS[backend]
    q = jax.ShapeDtypeStruct((B, length, N, H), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((B, length, K, H), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((B, length), jnp.int32) if documents else None
    forward = matmul_flops(jax.make_jaxpr(attend)(q, kv, kv, segments).jaxpr)
    both = jax.make_jaxpr(partial(with_gradients.__wrapped__, attend))(q, kv, kv, segments, q)
    shape = (B, length, N, H, documents)
    assert attention.forward_flops(backend, *shape) == forward
    assert attention.backward_flops(backend, *shape) == matmul_flops(both.jaxpr) - forward


@pytest.mark.parametrize(("length", "block", "keys"), [(384, 128, 128), (2048, 1024, 1024), (16384, 1024, 2048)])
def test_splash_counts_the_blocks_of_its_mask(length, block, keys):
    from jax.experimental.pallas.ops.tpu import splash_attention

    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * N),
        block_sizes=splash_attention.BlockSizes(
            block, block, block_q_dkv=block, block_kv_dkv=keys, block_kv_dkv_compute=block, use_fused_bwd_kernel=True
        ),
    )

    def flops(mask_info, products, rows, columns):
        visited = np.count_nonzero(np.broadcast_to(mask_info.block_mask, (N, *mask_info.block_mask.shape[1:])))
        return products * 2 * B * H * rows * columns * visited

    shape = (B, length, N, H, False)
    assert attention.forward_flops("splash", *shape) == flops(kernel.fwd_mask_info, 2, block, block)
    # Scores, dP, dQ, dK and dV.
    assert attention.backward_flops("splash", *shape) == flops(kernel.dkv_mask_info, 5, block, keys)


def test_triton_counts_the_blocks_of_its_loops():
    """By hand, T = 256: forward, rows 0-127 see 128 keys, the rest 256; backward, blocks of 64 on the diagonal."""
    rows = 2.0 * B * N * H
    assert attention.forward_flops("pallas_triton", B, 256, N, H, True) == 2 * rows * (128 * 128 + 128 * 256)
    backward = 64 * (64 + 128 + 192 + 256)
    assert attention.backward_flops("pallas_triton", B, 256, N, H, True) == (3 + 4) * rows * backward


@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_long_sequences_cost_the_causal_half_at_most_an_eighth_more(backend):
    T = 8192
    products = attention.forward_flops(backend, 1, T, N, H, False) / (2.0 * N * H * T * T)
    if backend == "xla":
        assert products == 2
    else:
        assert 1 < products <= 1.125
