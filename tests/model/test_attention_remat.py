"""Under the remat policy of `dots` a layer runs the forward kernel of attention once, and keeps little for it."""

from collections import Counter

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from attention_reference import matmul_flops
from jax._src.cudnn import fused_attention_stablehlo

from tlite_jax.model import attention

LAYERS, B, T, N, K, H, D = 3, 2, 256, 8, 2, 64, 96
DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
WIDTHS = (N * H, K * H, K * H)
FORWARD = {
    "cudnn": "dot_product_attention_fwd_wrapper",
    "pallas_triton": "mha_forward",
    "splash": "splash_mha_fwd_residuals",
}
BACKWARD = {
    "cudnn": ["dot_product_attention_bwd_wrapper"],
    "pallas_triton": ["mha_backward", "mha_preprocess_backward"],
    "splash": ["splash_mha_dkv_no_residuals"],
}


def dots(primitive, *avals, **params):
    return attention.is_kernel(primitive, params) or DOTS(primitive, *avals, **params)


def layer_scans(attend, segments, policy, length=T):
    """The equations of the two scans over layers, forward and backward, of a loss and its gradients."""

    def layer(x_BTD, weights):
        *projections, output = weights
        q, k, v = ((x_BTD @ weight).reshape(B, length, -1, H) for weight in projections)
        return x_BTD + attend(q, k, v, segments).reshape(B, length, -1) @ output, None

    def loss(x_BTD, weights):
        x_BTD, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), x_BTD, weights)
        return jnp.sum(jnp.square(x_BTD.astype(jnp.float32)))

    x = jax.ShapeDtypeStruct((B, length, D), jnp.bfloat16)
    weights = [jax.ShapeDtypeStruct((LAYERS, D, width), jnp.bfloat16) for width in WIDTHS]
    weights.append(jax.ShapeDtypeStruct((LAYERS, N * H, D), jnp.bfloat16))
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(x, weights)
    forward, backward = (equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    return forward, backward


def kernels(equation):
    """Names of the kernels in an equation, with how often; what yields nothing is dead code, which XLA drops."""
    if not equation.outvars:
        return Counter()
    if equation.primitive.name in ("pallas_call", "mpmd_map"):
        return Counter([equation.params["name"]])
    if equation.primitive.name.startswith("dot_product_attention"):
        return Counter([equation.primitive.name])
    inner = [getattr(jaxpr, "jaxpr", jaxpr) for jaxpr in jax.extend.core.jaxprs_in_params(equation.params)]
    return sum((kernels(nested) for jaxpr in inner for nested in jaxpr.eqns), Counter())


def kept_a_layer(forward):
    """(elements, dtype) of every array that the forward scan stacks for the backward one."""
    stacked = forward.outvars[forward.params["num_carry"] :]
    return Counter((variable.aval.size // LAYERS, str(variable.aval.dtype)) for variable in stacked)


EXPECTED = Counter({(B * T * D, "bfloat16"): 1})  # the layer's input
EXPECTED.update((B * T * width, "bfloat16") for width in WIDTHS)  # matrix products
EXPECTED.update([(B * T * N * H, "bfloat16"), (B * N * T, "float32")])  # attention: attended and logsumexp


@pytest.fixture(autouse=True)
def without_cudnn(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize("backend", FORWARD)
@pytest.mark.parametrize("documents", [False, True])
def test_the_forward_kernel_runs_once(backend, documents):
    if documents and backend == "cudnn":
        pytest.skip("cudnn has no document masks here")
    segments = jnp.ones((B, T), jnp.int32) if documents else None
    forward, backward = layer_scans(attention.BACKENDS[backend], segments, dots)

    def plain(counts):
        return {name.replace("_segmented", ""): count for name, count in counts.items()}

    assert plain(kernels(forward)) == {FORWARD[backend]: 1}
    assert plain(kernels(backward)) == dict.fromkeys(BACKWARD[backend], 1)
    assert kept_a_layer(forward) == EXPECTED


@pytest.mark.parametrize("backend", FORWARD)
def test_without_the_policy_the_forward_kernel_runs_twice(backend):
    """So that the test above can see it."""
    _, backward = layer_scans(attention.BACKENDS[backend], None, DOTS)
    assert kernels(backward)[FORWARD[backend]] == 1


@pytest.mark.parametrize("backend", FORWARD)
def test_attention_alone_can_be_kept(backend):
    forward, backward = layer_scans(attention.BACKENDS[backend], None, attention.keep_kernels)
    assert FORWARD[backend] not in kernels(backward)
    assert kept_a_layer(forward) == EXPECTED - Counter((B * T * width, "bfloat16") for width in WIDTHS)


def test_xla_chunked_keeps_its_output_and_recomputes_blocks_only():
    forward, _ = layer_scans(attention.xla_chunked, None, dots)
    assert kept_a_layer(forward) == EXPECTED - Counter([(B * N * T, "float32")])
    length = 9 * 256  # spans of three chunks
    forward, backward = layer_scans(attention.xla_chunked, None, dots, length)
    products = 2 * B * length * D * (sum(WIDTHS) + N * H)
    shape = (B, length, N, H, False)
    forward_flops = attention.forward_flops("xla_chunked", *shape)
    assert matmul_flops(forward.params["jaxpr"].jaxpr) == products + forward_flops
    backward_flops = attention.backward_flops("xla_chunked", *shape)
    assert matmul_flops(backward.params["jaxpr"].jaxpr) == 2 * products + backward_flops


@pytest.mark.parametrize(("backend", "backward_kernels"), [("tokamax_triton", 1), ("tokamax_mosaic", 2)])
@pytest.mark.parametrize("documents", [False, True])
def test_tokamax_runs_its_forward_kernel_once(backend, backward_kernels, documents, monkeypatch):
    pytest.importorskip("tokamax", reason="the extra tokamax is not installed")
    from tokamax import config
    from tokamax._src import gpu_utils

    monkeypatch.setattr(gpu_utils, "is_sm90", lambda device=None: backend == "tokamax_mosaic")
    segments = jnp.ones((B, T), jnp.int32) if documents else None
    with config.cross_compile(True):
        forward, backward = layer_scans(attention.BACKENDS[backend], segments, dots)
    statistics = Counter([(B * N * T, "float32")])  # the maximum and the sum of each row, in place of the logsumexp
    assert kept_a_layer(forward) == EXPECTED + statistics
    assert kernels(forward).total() == 1
    assert kernels(backward).total() == backward_kernels
