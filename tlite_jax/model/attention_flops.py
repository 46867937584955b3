"""FLOPs of the matrix products of attention as each backend executes them, masked parts and recomputation included.

A product of a block of r rows with c columns over a head of H counts 2 r c H. Exponentials and sums are not counted.
Document masks skip no block in any backend: they count as the causal mask does.

Shapes: B batch, T tokens, N heads, H head_dim.
"""

from tlite_jax.model.attention_kernels import TRITON_BACKWARD_BLOCK, TRITON_FORWARD_BLOCK, splash_blocks
from tlite_jax.model.attention_xla import spans

# Rows and columns of a block where the library decides: cuDNN does not say (128 x 128 assumed), tokamax by its
# heuristics for heads of 64 to 128.
_LIBRARY_BLOCK = {"cudnn": 128, "tokamax_triton": 64, "tokamax_mosaic": 128}
# Products of a backward pass. Five (scores, dP, dV, dQ, dK) in one pass over the blocks; seven in two passes, one for
# dQ and one for dK and dV, that both need the scores and dP.
_BACKWARD_PRODUCTS = {
    "xla": 4,
    "xla_chunked": 5,
    "cudnn": 5,
    "pallas_triton": 7,
    "tokamax_triton": 7,
    "tokamax_mosaic": 7,
    "splash": 5,
}


def forward_flops(name: str, B: int, T: int, N: int, H: int, document_masking: bool) -> float:
    """FLOPs of one forward call of a backend: the products of q with k and of the weights with v.

    Args:
      name: a key of `attention.BACKENDS`.
      B, T, N, H: sequences, tokens a sequence, query heads, head_dim.
      document_masking: whether there are segment ids.
    """
    del document_masking  # no backend skips a block for it
    return 2 * 2.0 * B * N * H * _scores(name, T, is_backward=False)


def backward_flops(name: str, B: int, T: int, N: int, H: int, document_masking: bool) -> float:
    """FLOPs of one backward call, the scores that the backend itself recomputes included.

    `xla` recomputes nothing itself; a remat policy that keeps no products with batch dims adds one product, the scores.
    """
    del document_masking
    return _BACKWARD_PRODUCTS[name] * 2.0 * B * N * H * _scores(name, T, is_backward=True)


def _scores(name: str, T: int, *, is_backward: bool) -> int:
    """Entries of the T x T matrix of scores that are computed, for one head."""
    if name == "xla":
        return T * T
    if name == "xla_chunked":
        return sum((stop - start) * stop for start, stop in spans(T))
    if name == "splash":
        rows, keys = splash_blocks(T)
        columns = keys if is_backward else rows
    elif name == "pallas_triton":
        rows = columns = TRITON_BACKWARD_BLOCK if is_backward else TRITON_FORWARD_BLOCK
    else:
        rows = columns = _LIBRARY_BLOCK[name]
    stops = range(rows, T + rows, rows)
    return rows * sum(-(-stop // columns) * columns for stop in stops)
