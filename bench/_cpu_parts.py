"""Where a step's CPU time goes: each part compiled alone, at its shapes in the step, and timed.

Shapes: B batch, T tokens, D embed, I in, O out, N heads, K kv heads, H head_dim, V vocab.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tlite_jax import optimizer as adamw
from tlite_jax.config import ExecutionConfig, ModelConfig, OptimizerConfig
from tlite_jax.loss import cross_entropy_and_gradients
from tlite_jax.model import attention, decoder
from tlite_jax.model.layers import linear
from tlite_jax.model.remat import remat

REPEATS = 5
LEAST_SECONDS = 0.1


def measure(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    execution: ExecutionConfig,
    shape_BT: tuple[int, ...],
    step: Callable[[], Any],
) -> dict[str, float]:
    """CPU seconds of all threads, medians: of a step, and of its parts.

    Args:
      model, optimizer, execution: the step's.
      shape_BT: of its tokens.
      step: takes one and waits for it.

    Returns:
      Seconds by part; `step` is the whole. `layers: elementwise` is what a layer compiled alone takes, less its
      products and its attention; `loss: elementwise` likewise.
    """
    layers, num_tokens = model.num_hidden_layers, int(np.prod(shape_BT))
    products = layers * sum(_linear(num_tokens, *spec.shape) for spec in _matrices(model))
    attended, layer = layers * _attention(model, shape_BT), layers * _layer(model, execution, shape_BT)
    # A chunk's three products, as often as there are chunks.
    num_chunks = -(-num_tokens // execution.loss_chunk_tokens)
    head = num_chunks * _linear(-(-num_tokens // num_chunks), model.vocab_size, model.hidden_size)
    return {
        "layers: matrix products": products,
        "layers: attention": attended,
        "layers: elementwise (norms, rope, silu)": layer - products - attended,
        "loss: matrix products": head,
        "loss: elementwise": _loss(model, execution, shape_BT) - head,
        "embedding's gradient (scatter-add)": _embedding(model, shape_BT),
        "optimizer (norm, clipping, AdamW)": _update(model, optimizer),
        "step": statistics.median(_timings(step)),
    }


def _timings(function: Callable[[], Any]) -> Iterator[float]:
    """CPU seconds of a call. Many short calls are timed as one: the kernel books another thread's time late."""
    function()
    start = time.perf_counter()
    function()
    calls = math.ceil(LEAST_SECONDS / (time.perf_counter() - start))
    for _ in range(REPEATS):
        begin = time.process_time()
        for _ in range(calls):
            function()
        yield (time.process_time() - begin) / calls


def _median(function: Callable[..., Any], *arguments: Any) -> float:
    compiled = jax.jit(function)
    return statistics.median(_timings(lambda: jax.block_until_ready(compiled(*arguments))))


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def _matrices(model: ModelConfig) -> list[decoder.ParamSpec]:
    return [spec for spec in decoder.block_specs(model).values() if len(spec.shape) == 2]


def _linear(num_tokens: int, num_out: int, num_in: int) -> float:
    """Forward, and the gradients of both operands, each alone: together XLA might compute one beside the other."""
    x, weight, dy = _normal(num_tokens, num_in), _normal(num_out, num_in), _normal(num_tokens, num_out)

    def gradient(argument: int) -> Callable[..., jax.Array]:
        return lambda x, weight, dy: jax.vjp(linear, x, weight)[1](dy)[argument]

    return _median(linear, x, weight) + sum(_median(gradient(argument), x, weight, dy) for argument in (0, 1))


def _attention(model: ModelConfig, shape_BT: tuple[int, ...]) -> float:
    q_BTNH = _normal(*shape_BT, model.num_attention_heads, model.head_dim)
    kv_BTKH = _normal(*shape_BT, model.num_key_value_heads, model.head_dim)

    def both(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Any:
        out_BTNH, vjp = jax.vjp(lambda q, k, v: attention.xla_chunked(q, k, v, None), q_BTNH, k_BTKH, v_BTKH)
        return out_BTNH, vjp(out_BTNH)

    return _median(both, q_BTNH, kv_BTKH, kv_BTKH)


def _layer(model: ModelConfig, execution: ExecutionConfig, shape_BT: tuple[int, ...]) -> float:
    graphdef = decoder.block_graphdef(model)
    weights = {name: 0.02 * _normal(*spec.shape) for name, spec in decoder.block_specs(model).items()}
    rope = decoder.rope_at(model, jnp.arange(shape_BT[1])[None])
    x_BTD = _normal(*shape_BT, model.hidden_size)

    def apply(weights: Any, x_BTD: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, weights)(x_BTD, rope, None, attend=attention.xla_chunked)

    def both(weights: Any, x_BTD: jax.Array, dx_BTD: jax.Array) -> Any:
        out_BTD, vjp = jax.vjp(remat(apply, execution.remat), weights, x_BTD)
        # The loss lies between the two in a step, so nothing computed forward is at hand but what is kept.
        saved, dx_BTD = jax.lax.optimization_barrier((jax.tree.leaves(vjp), dx_BTD))
        return out_BTD, jax.tree.unflatten(jax.tree.structure(vjp), saved)(dx_BTD)

    return _median(both, weights, x_BTD, x_BTD)


def _loss(model: ModelConfig, execution: ExecutionConfig, shape_BT: tuple[int, ...]) -> float:
    targets_BT = jnp.asarray(np.random.default_rng(0).integers(0, model.vocab_size, shape_BT, np.int32))
    return _median(
        lambda hidden, head: cross_entropy_and_gradients(
            hidden, head, targets_BT, chunk_tokens=execution.loss_chunk_tokens
        ),
        _normal(*shape_BT, model.hidden_size),
        0.02 * _normal(model.vocab_size, model.hidden_size),
    )


def _embedding(model: ModelConfig, shape_BT: tuple[int, ...]) -> float:
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, model.vocab_size, shape_BT, np.int32))
    dx_BTD = _normal(*shape_BT, model.hidden_size)
    state = [_normal(model.vocab_size, model.hidden_size)]
    add = jax.jit(lambda sums_VD: sums_VD.at[tokens_BT].add(dx_BTD), donate_argnums=0)

    def once() -> None:
        state[0] = add(state[0]).block_until_ready()

    return statistics.median(_timings(once))


def _update(model: ModelConfig, optimizer: OptimizerConfig) -> float:
    specs = decoder.param_specs(model)
    mask = adamw.decay_mask(optimizer, specs)
    # Each its own array: an argument that is given away cannot be given twice.
    params, gradients = (
        jax.tree.map(lambda s: 0.02 * _normal(*s.shape), specs, is_leaf=lambda leaf: hasattr(leaf, "axes"))
        for _ in range(2)
    )

    def update(params: Any, moments: Any, gradients: Any) -> Any:
        factor = adamw.clip_factor(adamw.global_norm(gradients), optimizer.max_gradient_norm)
        clipped = jax.tree.map(lambda gradient: gradient * factor, gradients)
        rate = jnp.float32(optimizer.learning_rate)
        return adamw.update(optimizer, clipped, moments, params, rate, mask)[:2]

    compiled = jax.jit(update, donate_argnums=(0, 1))
    state = [params, adamw.init(params)]
    del params

    def once() -> None:
        state[:] = jax.block_until_ready(compiled(*state, gradients))

    return statistics.median(_timings(once))
