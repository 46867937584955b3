"""Reads the compiled step on eight emulated devices: which collective runs where, how often and over whom."""

from collections import Counter

import jax
import jax.extend
import numpy as np
import pytest
from helpers import QUICK, tiny_model
from jax.sharding import NamedSharding

from tlite_jax import optimizer as adamw
from tlite_jax.config import ExecutionConfig, MeshConfig, OptimizerConfig, ScheduleConfig
from tlite_jax.plan import audit
from tlite_jax.plan.hlo import Module
from tlite_jax.sharding import BATCH_SPEC, make_mesh
from tlite_jax.train.norms import group_names
from tlite_jax.train.state import abstract_state
from tlite_jax.train.step import make_step

# Sizes that differ from each other, so that a shape names its parameter or at least its kind.
MODEL = tiny_model(
    vocab_size=131,
    hidden_size=22,
    intermediate_size=45,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=6,
    num_hidden_layers=5,
)
LAYERS, BLOCK_PARAMS, OTHER_PARAMS = 5, 9, 3
NUM_PARAMS = BLOCK_PARAMS + OTHER_PARAMS
NUM_MICROBATCHES = 3
BATCH_ROWS = 24


def execution_of(**changes):
    # float32: XLA for CPUs widens bfloat16 collectives.
    values = {"num_microbatches": NUM_MICROBATCHES, "loss_chunk_tokens": 8, "compute_dtype": "float32", **changes}
    return ExecutionConfig(**values)


def trace(execution, *, replica=2, fsdp=4, norms=False):
    mesh = make_mesh(MeshConfig(replica=replica, fsdp=fsdp))
    schedule = adamw.make_schedule(ScheduleConfig(name="constant_with_warmup", warmup_steps=2), 1e-2, 5)
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=1e-3)
    step = make_step(MODEL, optimizer, execution, mesh, schedule=schedule, norms=norms)
    row = jax.ShapeDtypeStruct((BATCH_ROWS, 12), np.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    return step.trace(abstract_state(MODEL, mesh), {"tokens": row, "targets": row})


def read(execution, *, replica=2, fsdp=4, norms=False):
    """The collectives and the departures from the intent; tiny ones count too."""
    compiled = trace(execution, replica=replica, fsdp=fsdp, norms=norms).lower().compile(compiler_options=QUICK)
    module = Module(compiled.as_text())
    intent = audit.Intent(MODEL, execution, replica, fsdp, batch_rows=BATCH_ROWS)
    return audit.collectives(module, intent, module.flops, devices_per_node=fsdp)


@pytest.fixture(autouse=True)
def count_small_ones(monkeypatch):
    monkeypatch.setattr(audit, "SMALL_BYTES", 4 * NUM_PARAMS)  # norms of gradients


@pytest.mark.parametrize(
    ("remat", "replica", "fsdp", "num_microbatches"),
    [("dots", 2, 4, 3), ("none", 2, 4, 1), ("full", 1, 8, 3), ("attention", 4, 2, 3), ("dots", 8, 1, 3)],
)
def test_the_step_communicates_as_it_was_written_to(remat, replica, fsdp, num_microbatches):
    execution = execution_of(remat=remat, num_microbatches=num_microbatches)
    _, violations = read(execution, replica=replica, fsdp=fsdp)
    assert violations == ()


@pytest.mark.parametrize(("replica", "fsdp"), [(2, 4), (1, 8), (8, 1)])
def test_metrics_take_two_reductions_at_the_end(replica, fsdp):
    """Losses of rows where the loss alone would take one, too; norms by group another, where shards are summed."""
    execution = execution_of()
    plain, _ = read(execution, replica=replica, fsdp=fsdp)
    found, _ = read(execution, replica=replica, fsdp=fsdp, norms=True)
    more = Counter(map(_place, found)) - Counter(map(_place, plain))
    rows_bytes, norms_bytes = 8 * BATCH_ROWS, 4 * 3 * len(group_names(MODEL))
    if replica == 1 or fsdp == 1:  # among the same devices: XLA puts some reductions together
        assert all(kind == "all-reduce" and where != "loop" and count == 1 for kind, where, _, count in more)
    else:
        assert sum(one.buffer_bytes == rows_bytes for one in plain) == 1
        assert dict(more) == {("all-reduce", "edge", norms_bytes, 1): 1}


def _place(collective):
    return collective.kind, collective.where, collective.buffer_bytes, collective.count


def test_its_bytes_are_the_unavoidable_ones_and_the_padding():
    execution = execution_of(num_microbatches=1)  # XLA for CPUs gathers what it can before the loop over several
    found, _ = read(execution)
    sent = sum(collective.count * collective.wire_bytes for collective in found)
    minimum = audit.Intent(MODEL, execution, 2, 4).minimum_wire_bytes()
    padded = sum(4 * -(-size // 4) for size in (131, 22, 45, 12, 6)) / sum((131, 22, 45, 12, 6))
    assert 1 <= sent / minimum < padded + 0.05


def test_layers_are_gathered_and_reduced_in_the_loops_over_layers():
    """What is left outside: the layers that fill and empty the pipeline."""
    found, _ = read(execution_of(num_microbatches=NUM_MICROBATCHES))
    where = Counter()
    for collective in found:
        where[collective.kind, collective.where] += collective.count
    microbatches = NUM_MICROBATCHES
    # All but the first layer forward and the two topmost backward (three in the last microbatch).
    assert where["all-gather", "loop"] % BLOCK_PARAMS == 0
    assert where["all-gather", "loop"] == BLOCK_PARAMS * (LAYERS * microbatches + (LAYERS - 2) * microbatches - 1)
    assert where["reduce-scatter", "loop"] == BLOCK_PARAMS * ((LAYERS - 2) * microbatches - 1)


@pytest.mark.parametrize(
    ("compute_dtype", "reduce_dtype", "replica_dtype"),
    [
        ("bfloat16", "float32", "bfloat16"),
        ("bfloat16", "bfloat16", "float32"),
        ("float32", "float32", "float32"),
    ],
)
def test_wires_carry_the_dtypes_asked_for(compute_dtype, reduce_dtype, replica_dtype):
    """Read before compilation: XLA for CPUs widens bfloat16 collectives."""
    execution = execution_of(compute_dtype=compute_dtype, reduce_dtype=reduce_dtype, replica_reduce_dtype=replica_dtype)
    dtypes = {}
    for name, dtype in _collective_dtypes(trace(execution).jaxpr.jaxpr):
        dtypes.setdefault(name, set()).add(dtype)
    # The loss and the count of scored tokens are float32 always.
    assert dtypes == {
        "all_gather": {compute_dtype},
        "reduce_scatter": {reduce_dtype},
        "psum": {replica_dtype, "float32"},
    }


def _collective_dtypes(jaxpr):
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name.startswith(("all_gather", "reduce_scatter", "psum", "ppermute", "all_to_all")):
            yield from ((name, variable.aval.dtype.name) for variable in equation.invars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _collective_dtypes(inner)


def test_the_choice_to_skip_an_update_keeps_no_second_state():
    """Every shard of parameters and moments is still updated in its own place."""
    state = abstract_state(MODEL, make_mesh(MeshConfig(replica=2, fsdp=4)))
    size = sum(4 * int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in jax.tree.leaves(state))
    for norms in (False, True):
        compiled = trace(execution_of(), norms=norms).lower().compile(compiler_options=QUICK)
        assert compiled.memory_analysis().alias_size_in_bytes == size
