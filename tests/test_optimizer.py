"""Against a float64 restatement, in plain numpy, of what Composer's DecoupledAdamW and its schedules do."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, tiny_model

from tlite_jax import optimizer
from tlite_jax.config import OptimizerConfig, ScheduleConfig
from tlite_jax.model.decoder import param_specs

PEAK = 3e-2
ADAM = OptimizerConfig(
    learning_rate=PEAK, beta1=0.85, beta2=0.93, eps=1e-3, weight_decay=2e-3, max_gradient_norm=2.0
)  # eps and decay large enough to matter
CONSTANT = ScheduleConfig(name="constant_with_warmup", warmup_steps=5)
COSINE = ScheduleConfig(name="cosine_with_warmup", warmup_steps=7, final_lr_fraction=0.1)
STEPS = 40


def reference_rate(schedule, peak, total_steps, t):
    warmup, total = schedule.warmup_steps, schedule.total_steps or total_steps
    if t < warmup:
        return peak * t / warmup
    if schedule.name == "constant_with_warmup":
        return peak
    x = min(1.0, (t - warmup) / (total - warmup))
    final = schedule.final_lr_fraction
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * x)) / 2)


def reference_steps(config, schedule, params, gradients, decays):
    """Params after every step; lists of float64 arrays."""
    params = [param.copy() for param in params]
    first, second = ([np.zeros_like(param) for param in params] for _ in range(2))
    for t, step_gradients in enumerate(gradients):
        rate = reference_rate(schedule, config.learning_rate, STEPS, t)
        initial = config.weight_decay_reference_lr or config.learning_rate
        norm = math.sqrt(sum(np.sum(gradient**2) for gradient in step_gradients))
        clip = 1.0 if config.max_gradient_norm is None else min(1.0, config.max_gradient_norm / (norm + 1e-6))
        s = t + 1
        for i, gradient in enumerate(step_gradients):
            g = gradient * clip
            if decays[i]:
                params[i] *= 1 - rate / initial * config.weight_decay
            first[i] = config.beta1 * first[i] + (1 - config.beta1) * g
            second[i] = config.beta2 * second[i] + (1 - config.beta2) * g * g
            denominator = np.sqrt(second[i]) / math.sqrt(1 - config.beta2**s) + config.eps
            params[i] -= rate / (1 - config.beta1**s) * first[i] / denominator
        yield [param.copy() for param in params], first, second


def problem(seed=0):
    """Params [[5], [4, 3], [2, 4, 3]] and gradients whose norm lies on both sides of the limit."""
    rng = np.random.default_rng(seed)
    shapes = [(5,), (4, 3), (2, 4, 3)]
    params = [rng.normal(size=shape) for shape in shapes]
    scales = 10 ** rng.uniform(-2, 1, STEPS)
    return params, [[scale * rng.normal(size=shape) for shape in shapes] for scale in scales]


def our_steps(config, schedule, params, gradients, decays, dtype):
    rate = optimizer.make_schedule(schedule, config.learning_rate, STEPS)

    @partial(jax.jit, compiler_options=QUICK)
    def step(t, params, state, gradients):
        factor = optimizer.clip_factor(optimizer.global_norm(gradients), config.max_gradient_norm)
        gradients = jax.tree.map(lambda gradient, factor=factor: gradient * factor, gradients)
        return optimizer.update(config, gradients, state, params, rate(t), decays)[:2]

    params = [jnp.asarray(param, dtype) for param in params]
    state = optimizer.init(params)
    for t, step_gradients in enumerate(gradients):
        cast = [jnp.asarray(gradient, dtype) for gradient in step_gradients]
        params, state = step(jnp.asarray(t), params, state, cast)
        yield params, state


VARIANTS = {
    "constant": (ADAM, CONSTANT, [True, True, True]),
    "cosine": (ADAM, COSINE, [True, True, True]),
    "cosine of its own length": (ADAM, COSINE.model_copy(update={"total_steps": 25}), [True, True, True]),
    "no warm-up": (ADAM, COSINE.model_copy(update={"warmup_steps": 0}), [True, True, True]),
    "no clipping": (ADAM.model_copy(update={"max_gradient_norm": None}), COSINE, [True, True, True]),
    "no decay": (ADAM.model_copy(update={"weight_decay": 0.0}), COSINE, [True, True, True]),
    "decay of another rate": (ADAM.model_copy(update={"weight_decay_reference_lr": 7e-3}), COSINE, [True] * 3),
    "matrices alone decay": (ADAM, COSINE, [False, True, True]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_equal_composers_in_float64(name):
    config, schedule, decays = VARIANTS[name]
    params, gradients = problem()
    with jax.enable_x64(True):
        ours = our_steps(config, schedule, params, gradients, decays, jnp.float64)
        theirs = reference_steps(config, schedule, params, gradients, decays)
        for t, ((our_params, state), (their_params, first, second)) in enumerate(zip(ours, theirs, strict=True)):
            for actual, expected in zip(
                (*our_params, *state.mu, *state.nu), (*their_params, *first, *second), strict=True
            ):
                assert actual.dtype == jnp.float64
                np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12, err_msg=f"step {t}")


def test_steps_equal_composers_in_float32():
    config, schedule, decays = VARIANTS["cosine"]
    params, gradients = problem()
    *_, (ours, state) = our_steps(config, schedule, params, gradients, decays, jnp.float32)
    *_, (theirs, *_) = reference_steps(config, schedule, params, gradients, decays)
    for actual, expected, start in zip(ours, theirs, params, strict=True):
        assert actual.dtype == jnp.float32
        # 40 roundings of values up to 3: 1e-6, of moves of about 0.1
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)
        assert np.max(np.abs(expected - start)) > 0.05
    assert {leaf.dtype for leaf in (*state.mu, *state.nu)} == {jnp.float32.dtype}
    assert state.num_updates == STEPS


def test_the_first_update_of_a_warm_up_moves_only_moments():
    params, gradients = problem()
    stepped, state = next(our_steps(ADAM, CONSTANT, params, gradients, [True] * 3, jnp.float32))
    for before, after in zip(params, stepped, strict=True):
        assert np.array_equal(after, before.astype(np.float32))
    assert all(np.all(np.asarray(moment) != 0) for moment in (*state.mu, *state.nu))
    assert state.num_updates == 1


def test_the_released_models_decay_is_adamws_tenth():
    """weight_decay 1e-6 at a rate of 1e-5 takes the fraction 1e-6 = 1e-5 * 0.1 of a parameter in each step."""
    config = OptimizerConfig(learning_rate=1e-5, weight_decay=1e-6)
    with jax.enable_x64(True):
        params = {"w": jnp.ones(3)}
        zeros = {"w": jnp.zeros(3)}
        stepped, *_ = optimizer.update(config, zeros, optimizer.init(params), params, jnp.asarray(1e-5), {"w": True})
        np.testing.assert_allclose(1 - stepped["w"], 1e-5 * 0.1, rtol=1e-9)


@pytest.mark.parametrize("schedule", [CONSTANT, COSINE], ids=lambda schedule: schedule.name)
def test_schedules_equal_composers(schedule):
    with jax.enable_x64(True):
        rate = optimizer.make_schedule(schedule, 1e-5, 30)
        ours = [float(rate(jnp.asarray(t))) for t in range(35)]
    theirs = [reference_rate(schedule, 1e-5, 30, t) for t in range(35)]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-20)
    assert ours[0] == 0
    assert ours[schedule.warmup_steps] == 1e-5


def test_clipping_equals_torchs():
    """The denominator holds torch's 1e-6: it shows where the limit is as small as that."""
    gradients = {"a": jnp.array([3e-6, 0.0]), "b": jnp.array([[4e-6]])}
    norm = optimizer.global_norm(gradients)
    assert float(norm) == pytest.approx(5e-6)
    clipped = jax.tree.map(lambda g: g * optimizer.clip_factor(norm, 1e-6), gradients)
    np.testing.assert_allclose(clipped["a"], [3e-6 / 6, 0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [[4e-6 / 6]], rtol=1e-6)
    untouched = jax.tree.map(lambda g: g * optimizer.clip_factor(norm, 1.0), gradients)
    assert np.array_equal(untouched["a"], gradients["a"])
    assert optimizer.clip_factor(norm, None) == 1


def test_masks_tell_matrices_from_vectors():
    specs = param_specs(tiny_model(attention_bias=True))
    every = optimizer.decay_mask(ADAM, specs)
    assert all(jax.tree.leaves(every))
    matrices = optimizer.decay_mask(ADAM.model_copy(update={"weight_decay_on": "matrices"}), specs)
    spared = {name for name, decays in {**matrices, **matrices["blocks"]}.items() if decays is False}
    assert spared == {
        "final_norm", "attention_norm", "mlp_norm", "query_bias", "key_bias", "value_bias", "output_bias",
    }  # fmt: skip
    assert jax.tree.structure(matrices) == jax.tree.structure(every)
