"""Reads the compiled step: which collective runs where, over whom, in which dtype."""

import re
from collections import Counter
from typing import NamedTuple

import jax
import jax.extend
import numpy as np
import pytest
from helpers import QUICK, tiny_model
from jax.sharding import NamedSharding

from tlite_jax import optimizer as adamw
from tlite_jax.config import ExecutionConfig, MeshConfig, OptimizerConfig, ScheduleConfig
from tlite_jax.model.decoder import param_specs
from tlite_jax.sharding import BATCH_SPEC, make_mesh, map_specs, padded_shape
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
    num_hidden_layers=3,
)
NUM_REPLICAS, NUM_SHARDS, NUM_PARAMS = 2, 4, 12
WITHIN_GROUP = frozenset({frozenset(range(4)), frozenset(range(4, 8))})
ACROSS_GROUPS = frozenset(frozenset({shard, shard + 4}) for shard in range(4))
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")


class Collective(NamedTuple):
    """One collective of the compiled program; `loops` counts the while loops around it."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]  # of its operands' counterparts in the result
    groups: frozenset[frozenset[int]]
    loops: int


def parse_groups(text):
    """Replica groups as a set of sets, from any form in which XLA writes them.

    `{{0,1},{2,3}}`; `[groups,members]<=[dims]T(permutation)`, a transposed count; `mesh['a'=2,'b'=4] {'b'}`, all
    devices that differ along the named axes, with the order of devices as another transposed count.
    """
    if explicit := re.match(r"\{(\{[\d,{} ]*\})\}", text):
        rows = re.findall(r"\{([\d, ]+)\}", explicit[1])
        return frozenset(frozenset(map(int, row.split(","))) for row in rows)
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((\[.*?)\))? \{([^}]*)\}", text):
        axes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
        names, sizes = [name for name, _ in axes], [int(size) for _, size in axes]
        ids = _counted(mesh[2]) if mesh[2] else np.arange(np.prod(sizes))
        along = [names.index(name) for name in re.findall(r"'(\w+)'", mesh[3])]
        across = [axis for axis in range(len(sizes)) if axis not in along]
        groups = ids.reshape(sizes).transpose(across + along).reshape(-1, np.prod([sizes[axis] for axis in along]))
    else:
        shape, count = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text).groups()
        groups = _counted(count).reshape(_numbers(shape))
    return frozenset(frozenset(row.tolist()) for row in groups)


def _counted(text):
    """`[2,4]T(1,0)`: 0, 1, 2.. in that shape, transposed."""
    dims, permutation = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", text).groups()
    ids = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(permutation)) if permutation else ids


def _numbers(text):
    return [int(number) for number in text.split(",")]


def collectives(hlo):
    """Every Collective that the program's entry reaches, once per place from which it is reached."""
    computations, entry, name = {}, None, None
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name and "=" in line:
            computations[name].append(line)
    assert entry

    def visit(name, loops):
        for line in computations[name]:
            kinds = "|".join(COLLECTIVES)
            if found := re.match(rf"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ({kinds})(?:-start)?\(", line):
                shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
                sizes = tuple(tuple(int(size) for size in shape.split(",") if size) for shape in shapes)
                groups = parse_groups(line.split("replica_groups=")[1])
                yield Collective(found[2], sizes, groups, loops)
                continue
            for role, callee in re.findall(r"(body|condition|to_apply|calls)=%?([\w.\-]+)", line):
                yield from visit(callee, loops + (role == "body"))

    return list(visit(entry, 0))


def trace(*, remat="dots", **changes):
    mesh = make_mesh(MeshConfig(replica=NUM_REPLICAS, fsdp=NUM_SHARDS))
    execution = ExecutionConfig(num_microbatches=2, loss_chunk_tokens=8, remat=remat, **changes)
    schedule = adamw.make_schedule(ScheduleConfig(name="constant_with_warmup", warmup_steps=2), 1e-2, 5)
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=1e-3)
    step = make_step(MODEL, optimizer, execution, mesh, schedule=schedule)
    row = jax.ShapeDtypeStruct((16, 12), np.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    return step.trace(abstract_state(MODEL, mesh), {"tokens": row, "targets": row})


@pytest.fixture(scope="module", params=["dots", "none", "full"])
def program(request):
    compiled = trace(remat=request.param).lower().compile(compiler_options=QUICK)
    return collectives(compiled.as_text())


@pytest.fixture(scope="module")
def stored_shapes():
    """(of the block's parameters without the layer axis, of the others)"""
    specs = param_specs(MODEL)
    shapes = map_specs(lambda spec: padded_shape(spec, NUM_SHARDS), specs)
    blocks = [shape[1:] for shape in shapes.pop("blocks").values()]
    return blocks, list(shapes.values())


def shard_of(shape):
    return (shape[0] // NUM_SHARDS, *shape[1:])


def test_weights_are_gathered_layer_by_layer_within_their_group(program, stored_shapes):
    """A block's twice, forward and again backward, in the loop over layers in the loop over microbatches.

    The embedding, last norm and head once, outside the inner loop: the one over the loss's chunks is such a loop too.
    (XLA moves these gathers out of the outer loop as well where it sees that the weights do not change there.)
    """
    blocks, edges = stored_shapes
    gathers = [collective for collective in program if collective.kind == "all-gather"]
    assert {gather.groups for gather in gathers} == {WITHIN_GROUP}
    assert {gather.loops for gather in gathers} <= {0, 1, 2}
    inner = Counter(gather.shapes[-1] for gather in gathers if gather.loops == 2)
    outer = Counter(gather.shapes[-1] for gather in gathers if gather.loops < 2)
    assert outer == Counter(edges)
    # A norm's weight, a vector, may be kept for the backward pass.
    twice, vectors = Counter(blocks * 2), {shape for shape in blocks if len(shape) == 1}
    assert inner <= twice
    assert set((twice - inner).elements()) <= vectors


def test_gradients_are_reduce_scattered_within_their_group(program, stored_shapes):
    blocks, edges = stored_shapes
    scatters = [collective for collective in program if collective.kind == "reduce-scatter"]
    assert {scatter.groups for scatter in scatters} == {WITHIN_GROUP}
    assert Counter((scatter.loops, scatter.shapes[-1]) for scatter in scatters) == Counter(
        [(2, shard_of(shape)) for shape in blocks] + [(1, shard_of(shape)) for shape in edges]
    )


def test_replicas_reduce_every_parameter_once_after_the_last_microbatch(program, stored_shapes):
    blocks, edges = stored_shapes
    reductions = [collective for collective in program if collective.groups == ACROSS_GROUPS]
    assert {(reduction.kind, reduction.loops) for reduction in reductions} == {("all-reduce", 0)}
    layers = MODEL.num_hidden_layers
    operands = Counter(shape for reduction in reductions for shape in reduction.shapes)
    assert operands == Counter([(layers, *shard_of(shape)) for shape in blocks] + [shard_of(shape) for shape in edges])
    assert operands.total() == NUM_PARAMS


def test_nothing_else_crosses_the_network_but_scalars(program):
    for collective in program:
        if collective.kind == "all-reduce" and collective.groups != ACROSS_GROUPS:
            assert set(collective.shapes) == {()}
            assert collective.loops == 0
        else:
            assert collective.kind in ("all-gather", "reduce-scatter", "all-reduce")


@pytest.mark.parametrize(
    ("compute_dtype", "reduce_dtype"), [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")]
)
def test_wires_carry_the_dtypes_asked_for(compute_dtype, reduce_dtype):
    """Read before compilation: XLA for CPUs widens bfloat16 collectives."""
    jaxpr = trace(compute_dtype=compute_dtype, reduce_dtype=reduce_dtype).jaxpr
    dtypes = Counter(_collective_dtypes(jaxpr.jaxpr))
    blocks, edges = 9, 3
    assert dtypes == {
        ("all_gather", compute_dtype): 2 * blocks + edges,
        ("reduce_scatter", reduce_dtype): blocks + edges,
        # across replicas, and the loss and the count of scored tokens
        ("psum", "float32"): NUM_PARAMS + 2,
    }


def _collective_dtypes(jaxpr):
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name.startswith(("all_gather", "reduce_scatter", "psum", "ppermute", "all_to_all")):
            yield from ((name, variable.aval.dtype.name) for variable in equation.invars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _collective_dtypes(inner)


@pytest.mark.parametrize(
    "text",
    [
        "{{0,4},{1,5},{2,6},{3,7}}, use_global",
        "[4,2]<=[2,4]T(1,0), use_global",
        "[4,2]<=[2,2,2]T(1,2,0)",
        "mesh['replica'=2,'fsdp'=4] {'replica'}, use_global",
        "mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1','axis_2'}, use_global",
    ],
)
def test_replica_groups_are_read_in_every_form(text):
    assert parse_groups(text) == ACROSS_GROUPS


@pytest.mark.parametrize(
    "text", ["{{0,1,2,3},{4,5,6,7}}", "[2,4]<=[8], channel", "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}"]
)
def test_groups_of_neighbours_are_read_in_every_form(text):
    assert parse_groups(text) == WITHIN_GROUP
