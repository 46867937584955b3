"""Norms by group of parameters against numpy, and that asking for them changes no bit of what is trained."""

from itertools import pairwise

import jax
import numpy as np
import pytest
from helpers import QUICK, random_batch, tiny_model, unpad_params
from jax.sharding import NamedSharding

from tlite_jax import optimizer as adamw
from tlite_jax.config import ExecutionConfig, MeshConfig, OptimizerConfig, ScheduleConfig
from tlite_jax.model import decoder
from tlite_jax.sharding import BATCH_SPEC, make_mesh
from tlite_jax.train.norms import group_names, named_norms
from tlite_jax.train.state import init_state
from tlite_jax.train.step import NORMS, make_gradients, make_step

MODEL = tiny_model(num_hidden_layers=11, attention_bias=True, hidden_size=22, intermediate_size=45)
SPECS = decoder.param_specs(MODEL)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, eps=1e-6, weight_decay=1e-3, max_gradient_norm=0.3)
EXECUTION = ExecutionConfig(compute_dtype="float32", loss_chunk_tokens=64, num_microbatches=3, attention="xla")
SCHEDULE = adamw.make_schedule(ScheduleConfig(name="constant_with_warmup", warmup_steps=2), 1e-2, 5)


def steps_on(mesh, batches, *, norms, quick=True):
    """States and metrics after each step."""
    step = make_step(MODEL, OPTIMIZER, EXECUTION, mesh, schedule=SCHEDULE, norms=norms)
    state = init_state(MODEL, mesh, seed=1)
    compiled = step.lower(state, batches[0]).compile(compiler_options=QUICK if quick else None)
    for batch in batches:
        state, metrics = compiled(state, batch)
        yield jax.tree.map(np.array, state), {name: np.asarray(value) for name, value in metrics.items()}


def batches_on(mesh, num):
    batches = [random_batch(MODEL, rows=24, length=12, seed=seed) for seed in range(num)]
    return [jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC)) for batch in batches]


def expected(params):
    """Of logical arrays, one layer and one parameter at a time, in float64."""
    squares = dict.fromkeys(group_names(MODEL), 0.0)

    def add(group, array):
        squares[group] += float(np.sum(np.square(np.asarray(array, np.float64))))

    first = [0, 1, 2, 4, 5, 6, 8, 9, 11]  # 11 layers in 8 ranges
    for low, end in pairwise(first):
        place = f"{low:02d}" if end == low + 1 else f"{low:02d}-{end - 1:02d}"
        for layer in range(low, end):
            for name, stack in params["blocks"].items():
                kind = "norms" if name.endswith("norm") else "mlp" if name in ("gate", "up", "down") else "attention"
                add(kind if kind == "norms" else f"{kind}.{place}", stack[layer])
    add("embedding", params["embedding"])
    add("norms", params["final_norm"])
    add("head", params["head"])
    return {group: value**0.5 for group, value in squares.items()}


@pytest.mark.parametrize(("replica", "fsdp"), [(2, 4), (1, 8), (1, 1)])
def test_norms_are_those_of_the_arrays(replica, fsdp):
    mesh = make_mesh(MeshConfig(replica=replica, fsdp=fsdp), jax.devices()[: replica * fsdp])
    batches = batches_on(mesh, 3)
    before = jax.tree.map(np.array, init_state(MODEL, mesh, seed=1))
    gradients_fn = jax.jit(make_gradients(MODEL, EXECUTION, mesh, False), compiler_options=QUICK)
    for batch, (state, metrics) in zip(batches, steps_on(mesh, batches, norms=True), strict=True):
        gradients, rows = gradients_fn(before.params, batch)
        old, new = unpad_params(before.params, SPECS), unpad_params(state.params, SPECS)
        found, count = named_norms(MODEL, metrics[NORMS]), float(np.asarray(rows)[:, 1].sum())
        wanted = {
            f"group_{kind}_norm/{group}": value / scale
            for kind, tree, scale in (
                ("gradient", unpad_params(gradients, SPECS), count),
                ("parameter", new, 1),
                ("update", jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, new, old), 1),
            )
            for group, value in expected(tree).items()
        }
        assert found == pytest.approx(wanted, rel=2e-4)
        groups = [value for name, value in found.items() if name.startswith("group_gradient_norm/")]
        assert np.linalg.norm(groups) == pytest.approx(float(metrics["gradient_norm"]), rel=1e-5)
        before = state
    assert found["group_update_norm/attention.00"] > 0
    assert metrics["gradient_norm"] > OPTIMIZER.max_gradient_norm, "nothing was clipped"


def test_they_change_no_bit_of_the_training():
    """In the program that training runs: with little code generation XLA takes the global norm in another order."""
    mesh = make_mesh(MeshConfig(replica=2, fsdp=4))
    batches = batches_on(mesh, 3)
    pairs = zip(*(steps_on(mesh, batches, norms=norms, quick=False) for norms in (False, True)), strict=True)
    for (state, metrics), (other, other_metrics) in pairs:
        assert other_metrics.keys() - metrics.keys() == {NORMS}
        for found, same in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            assert found.tobytes() == same.tobytes()
        assert all(other_metrics[name].tobytes() == value.tobytes() for name, value in metrics.items())


def test_a_skipped_step_updates_nothing():
    mesh = make_mesh(MeshConfig(replica=2, fsdp=4))
    state = init_state(MODEL, mesh, seed=1)
    broken = {**state.params, "final_norm": state.params["final_norm"] * np.nan}
    step = make_step(MODEL, OPTIMIZER, EXECUTION, mesh, schedule=SCHEDULE, norms=True)
    _, metrics = step(state._replace(params=broken), batches_on(mesh, 1)[0])
    assert metrics["skipped"] == 1
    found = named_norms(MODEL, np.asarray(metrics[NORMS]))
    assert all(value == 0 for name, value in found.items() if "update" in name)
    assert np.isnan(found["group_gradient_norm/head"])
    assert np.isfinite(found["group_parameter_norm/head"])


@pytest.mark.parametrize(
    ("layers", "names"), [(1, ["0"]), (3, ["0", "1", "2"]), (32, [f"{i:02d}-{i + 3:02d}" for i in range(0, 32, 4)])]
)
def test_groups_are_ranges_of_layers(layers, names):
    found = group_names(tiny_model(num_hidden_layers=layers, tie_word_embeddings=True))
    ranges = [f"{kind}.{name}" for kind in ("attention", "mlp") for name in names]
    assert found == ("embedding", *ranges, "norms")
