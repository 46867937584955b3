"""Decoupled AdamW, its schedules and gradient clipping, with the semantics of MosaicML Composer.

Pure functions over nested dicts of arrays; optax does the arithmetic. At batch t (0-based, t = batches completed):

    gradient <- gradient * min(1, max_norm / (norm + 1e-6))
    p <- p (1 - (lr_t / reference_lr) weight_decay) - lr_t m_hat / (sqrt(v_hat) + eps)

(`composer/optim/decoupled_weight_decay.py`, `composer/optim/scheduler.py`; torch's `clip_grad_norm_`.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tlite_jax.config import OptimizerConfig, ScheduleConfig

Tree = Any  # a nested dict of arrays
Schedule = Callable[[jax.Array | int], jax.Array]


class AdamState(NamedTuple):
    """First and second moments, float32, shaped and sharded like the parameters, and how often they were updated."""

    num_updates: jax.Array
    mu: Tree
    nu: Tree


def init(params: Tree) -> AdamState:
    """Zero moments."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return AdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))


def make_schedule(config: ScheduleConfig, peak: float, total_steps: int) -> Schedule:
    """The learning rate after t completed batches; 0 at t = 0 when there is a warm-up.

    Args:
      config: the schedule.
      peak: the learning rate at the end of warm-up.
      total_steps: where the cosine reaches its end, unless config.total_steps says otherwise.
    """
    warmup = optax.schedules.linear_schedule(0.0, peak, config.warmup_steps)
    if config.name == "constant_with_warmup":
        rest: Schedule = optax.schedules.constant_schedule(peak)
    else:
        decay_steps = (config.total_steps or total_steps) - config.warmup_steps
        rest = optax.schedules.cosine_decay_schedule(peak, max(decay_steps, 1), alpha=config.final_lr_fraction)
    return optax.schedules.join_schedules([warmup, rest], [config.warmup_steps]) if config.warmup_steps else rest


def global_norm(gradients: Tree) -> jax.Array:
    """The L2 norm over all leaves, across shards; float32 scalar."""
    return optax.tree.norm(gradients)


def clip_factor(norm: jax.Array, max_norm: float | None) -> jax.Array | float:
    """What gradients of this global L2 norm are multiplied by, so that it is at most max_norm."""
    return 1.0 if max_norm is None else jnp.minimum(1.0, max_norm / (norm + 1e-6))


def decay_mask(config: OptimizerConfig, specs: Tree) -> Tree:
    """Which parameters decay: a nested dict of bools. `specs` has a ParamSpec (see model.decoder) per parameter."""
    return jax.tree.map(
        lambda spec: config.weight_decay_on == "all" or len(spec.axes) > 1,
        specs,
        is_leaf=lambda x: hasattr(x, "axes"),
    )


def update(
    config: OptimizerConfig,
    gradients: Tree,
    state: AdamState,
    params: Tree,
    learning_rate: jax.Array,
    mask: Tree,
) -> tuple[Tree, AdamState, Tree]:
    """One step of decoupled AdamW.

    Args:
      config: betas, eps, decay and the rate it refers to.
      gradients: already averaged over tokens and clipped.
      state: moments.
      params: float32 masters.
      learning_rate: this step's, a scalar.
      mask: from `decay_mask`.

    Returns:
      New parameters and state, and what was subtracted from the parameters.
    """
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)
    moves, moments = adam.update(gradients, optax.ScaleByAdamState(state.num_updates, state.mu, state.nu))
    decay = config.weight_decay / (config.weight_decay_reference_lr or config.learning_rate)

    def change(param: jax.Array, move: jax.Array, decays: bool) -> jax.Array:
        return learning_rate * (move + decay * param if decays and decay else move)

    changes = jax.tree.map(change, params, moves, mask)
    new_params = jax.tree.map(jnp.subtract, params, changes)
    return new_params, AdamState(moments.count, moments.mu, moments.nu), changes
