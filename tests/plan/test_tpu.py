"""What libtpu makes of collectives when it is told `compile_options`: they go on beside products."""

import json
import subprocess
import sys

import pytest
from helpers import tiny_model

from tlite_jax.plan import worker
from tlite_jax.plan.topology import load_hardware

# As the step has them, without attention, loss and edges, whose compilation takes minutes: while a layer computes, the
# weights of the next are gathered, the gradients of the one before are reduce-scattered, and those of the one before
# that summed over replicas.
_COMPILE = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from tlite_jax.config import ExecutionConfig, MeshConfig, ModelConfig
from tlite_jax.config_files import parse
from tlite_jax.plan.audit import Intent, collectives
from tlite_jax.plan.hlo import Module
from tlite_jax.plan.topology import devices, load_hardware
from tlite_jax.model.decoder import ParamSpec
from tlite_jax.sharding import Collectives, make_mesh
from tlite_jax.train.compile_options import compile_options

L, T, D, F = 6, 2048, 1024, 4096
model, execution = parse(ModelConfig, json.loads(sys.argv[3]), origin="test"), ExecutionConfig()
mesh = make_mesh(MeshConfig(replica=2, fsdp=4), devices(load_hardware(sys.argv[1], Path(sys.argv[2])), 2))
over = Collectives.of(mesh, execution)
specs = dict.fromkeys(("up", "down"), ParamSpec((F, D), ("mlp", "embed")))

def layer(weights, x):
    return x + jax.nn.silu(x @ weights["up"].T) @ weights["down"]

def index(stack, i):
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), stack)

def update(stack, i, value):
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0), stack, value)

def local(blocks, sums, x):
    def body(carry, i):
        x, weights, gradients, sums = carry
        following = over.gather(index(blocks, i), specs)
        incomplete, complete = jax.lax.optimization_barrier((index(sums, i + 1), index(sums, i + 2)))
        sums = update(sums, i + 2, over.sum_replicas(complete))
        sums = update(sums, i + 1, over.accumulate(incomplete, gradients, specs))
        x, vjp = jax.vjp(layer, weights, x)
        gradients, dx = vjp(x)
        return (x + dx, following, gradients, sums), None

    first = over.gather(index(blocks, L - 1), specs)
    start = x, first, jax.tree.map(jnp.zeros_like, first), sums
    return jax.lax.scan(body, start, jnp.arange(L - 3, -1, -1))[0][::3]

stacked, batch = P(None, ("fsdp", "context")), P(("replica", "fsdp", "context"))
shards = dict.fromkeys(specs, stacked)
step = jax.shard_map(local, mesh=mesh, in_specs=(shards, shards, batch), out_specs=(batch, shards), check_vma=False)

def abstract(shape, spec, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

block = dict.fromkeys(specs, abstract((L, F, D), stacked, jnp.float32))
n = mesh.size
arguments = block, block, abstract((n * T, D), batch, jnp.bfloat16)
options = compile_options(model, execution, mesh)
module = Module(jax.jit(step, donate_argnums=1, compiler_options=options).lower(*arguments).compile().as_text())
found, _ = collectives(module, Intent(model, execution, 2, 4), module.flops, devices_per_node=n)
print(json.dumps([[c.kind, c.where, c.count, c.buffer_bytes, c.is_async, c.overlapped_flops] for c in found]))
"""


def test_collectives_go_on_beside_products(request):
    directory = request.config.rootpath / "configs" / "hardware"
    if (missing := worker.plugin_is_missing(load_hardware("v5p", directory))) is not None:
        pytest.skip(missing)
    command = [sys.executable, "-c", _COMPILE, "v5p", str(directory), json.dumps(tiny_model().model_dump())]
    environment = {**worker.inherited(), **worker.ENVIRONMENT}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    layers, matrix = 4, 4096 * 1024
    products = 6 * 2 * 2048 * matrix  # of an iteration: two forward, four backward
    expected = {
        ("all-gather", "loop"): layers * 2 * matrix * 2,
        ("reduce-scatter", "loop"): layers * 2 * matrix * 4,
        ("all-reduce", "replica"): layers * 2 * matrix * 4 // 4,
    }
    for (kind, where), wanted in expected.items():
        members = [each for each in found if each[:2] == [kind, where]]
        assert sum(count * buffer for _, _, count, buffer, _, _ in members) == wanted
        assert all(is_async and flops == products for *_, is_async, flops in members), (kind, members)
