"""The step compiled for two described nodes of four A100s: what it must be, and that the audit sees when it is not."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny_model

from tlite_jax.config import RunConfig
from tlite_jax.config_files import parse
from tlite_jax.plan import audit
from tlite_jax.plan import compile as plan_compile
from tlite_jax.plan.cost import estimate
from tlite_jax.plan.topology import devices, load_hardware
from tlite_jax.sharding import DEVICES, FSDP, Collectives
from tlite_jax.train import gradients as gradients_module
from tlite_jax.train.gradients import Gradients
from tlite_jax.train.layers import Forward, Layers

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins.xla_cuda12") is None,
    reason="needs the compiler for NVIDIA: pip install 'tlite_jax[plan-gpu]'",
)
NODES, PER_NODE = 2, 4
SMALL = tiny_model(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
)
# Llama-3-8B.
WIDE = tiny_model(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
)


@pytest.fixture(scope="module")
def hardware(request):
    return load_hardware("a100-80gb", request.config.rootpath / "configs" / "hardware")


@pytest.fixture(scope="module")
def cluster(hardware):
    return devices(hardware.model_copy(update={"devices_per_node": PER_NODE}), NODES)


def config_of(model, length, *, replica=NODES, num_microbatches=2, sequences=1, **execution):
    values = {
        "output": "unused",
        "model": model.model_dump(),
        "data": {"buckets": "unused", "tokenizer": "unused", "sequence_length": length},
        "optimizer": {"learning_rate": 1e-5, "weight_decay": 1e-6},
        "schedule": {"name": "constant_with_warmup", "warmup_steps": 10},
        "train": {"steps": 10, "batch_size": NODES * PER_NODE * num_microbatches * sequences},
        "mesh": {"replica": replica, "fsdp": NODES * PER_NODE // replica},
        "execution": {"num_microbatches": num_microbatches, "loss_chunk_tokens": 1024, **execution},
    }
    return parse(RunConfig, values, origin="test")


def compile_program(config, cluster):
    return plan_compile.compile_program(config, cluster, devices_per_node=PER_NODE)


@pytest.mark.parametrize(("replica", "num_microbatches"), [(NODES, 3), (1, 1)])
def test_the_step_is_what_it_should_be(replica, num_microbatches, cluster, hardware):
    config = config_of(WIDE, 8192, replica=replica, num_microbatches=num_microbatches)
    program = compile_program(config, cluster)
    cost = estimate(program, hardware, config, nodes=NODES, headroom=0.05)
    assert program.violations == ()
    assert cost.wire_ratio <= 1.01
    assert cost.flop_ratio <= 1.05
    assert cost.memory_ratio <= 1.1
    assert cost.hidden_share["loop"] >= 0.9
    assert all(collective.is_async for collective in program.collectives if collective.where == "loop")
    sums = [collective for collective in program.collectives if collective.where == "replica"]
    assert bool(sums) == (replica > 1)
    assert cost.hidden_share["replica"] >= 0.8
    assert program.memory.arguments_bytes >= program.memory.parameters_bytes + program.memory.optimizer_bytes


def test_other_settings_depart_from_nothing_either(cluster):
    config = config_of(SMALL, 1024, replica_reduce_dtype="bfloat16", reduce_dtype="bfloat16", remat="full")
    assert compile_program(config, cluster).violations == ()


def test_a_replica_reduction_in_the_loop_over_microbatches_is_seen(cluster, monkeypatch):
    original = Gradients._microbatch
    monkeypatch.setattr(Gradients, "_microbatch", lambda *args, last: original(*args, last=True))
    violations = compile_program(config_of(SMALL, 1024, num_microbatches=4), cluster).violations
    assert any("inside the loop over microbatches" in violation for violation in violations)
    assert any("each gradient shard's once" in violation for violation in violations)


def test_rows_may_be_many_but_their_losses_are_summed_up_once(cluster, monkeypatch):
    config = config_of(SMALL, 16, num_microbatches=2, sequences=1024)
    assert config.train.batch_size * 8 > audit.SMALL_BYTES
    assert compile_program(config, cluster).violations == ()
    original = Gradients._microbatch

    def in_each_microbatch(self, *args, last):
        sums, rows_B2 = original(self, *args, last=last)
        whole = jax.lax.psum(jnp.tile(rows_B2, (16, 1)), DEVICES)
        return sums, rows_B2 + 0 * whole[: len(rows_B2)]

    monkeypatch.setattr(Gradients, "_microbatch", in_each_microbatch)
    violations = compile_program(config_of(SMALL, 16, num_microbatches=3, sequences=1024), cluster).violations
    assert any("over 1 groups of 8, in no place of the plan" in violation for violation in violations)


def test_a_gather_of_the_head_in_the_loop_over_chunks_is_seen(cluster, monkeypatch):
    original = gradients_module.cross_entropy_and_gradients

    def regathering(hidden_BTD, head_VD, targets_BT, *, chunk_tokens):
        size = head_VD.shape[0] // PER_NODE
        shard = jax.lax.dynamic_slice_in_dim(head_VD, jax.lax.axis_index(FSDP) * size, size)

        def body(total, chunk):
            hidden_CD, targets_C = chunk
            head_VD = jax.lax.all_gather(shard + 0 * total[0, 0].astype(shard.dtype), FSDP, axis=0, tiled=True)
            found = original(hidden_CD[None], head_VD, targets_C[None], chunk_tokens=chunk_tokens)
            losses, (dhidden, dhead) = found
            return total + dhead, (losses[0], dhidden[0])

        parts = hidden_BTD.reshape(-1, chunk_tokens, hidden_BTD.shape[-1]), targets_BT.reshape(-1, chunk_tokens)
        dhead_VD, (losses, dhidden) = jax.lax.scan(body, jnp.zeros(head_VD.shape, jnp.float32), parts)
        return losses.reshape(targets_BT.shape), (dhidden.reshape(hidden_BTD.shape), dhead_VD)

    monkeypatch.setattr(gradients_module, "cross_entropy_and_gradients", regathering)
    violations = compile_program(config_of(SMALL, 1024, loss_chunk_tokens=256), cluster).violations
    assert any("all-gather of [1024, 512]" in violation and "are needed" in violation for violation in violations)


def test_a_gather_in_float32_is_seen(cluster, monkeypatch):
    original = Collectives.gather

    def wide(self, shards, specs):
        narrow = original(Collectives(**{**vars(self), "compute_dtype": "float32"}), shards, specs)
        return jax.tree.map(lambda leaf: jax.lax.reduce_precision(leaf, 8, 7).astype("bfloat16"), narrow)

    monkeypatch.setattr(Collectives, "gather", wide)
    violations = compile_program(config_of(SMALL, 1024), cluster).violations
    assert any("all-gather in f32, bf16 was asked for" in violation for violation in violations)


def test_a_reduction_over_the_whole_world_is_seen(cluster, monkeypatch):
    def everywhere(self, gradients, specs):
        whole = jax.tree.map(lambda gradient: jax.lax.psum(gradient, ("replica", "fsdp")), gradients)
        return original(self, whole, specs)

    original = Collectives.scatter
    monkeypatch.setattr(Collectives, "scatter", everywhere)
    violations = compile_program(config_of(SMALL, 1024), cluster).violations
    assert any("over 1 groups of 8, in no place of the plan" in violation for violation in violations)


def test_a_gather_that_nothing_hides_is_seen(cluster, hardware, monkeypatch):
    """Each layer gathers its own weights when it needs them, as it would without the pipeline."""

    def forward(self, blocks, x_BTD, rope, segment_ids_BT):
        apply = self._apply()

        def body(x_BTD, layer):
            x_BTD, vjp = jax.vjp(apply, original(self, blocks, layer), x_BTD, rope, segment_ids_BT)
            vjp.args_res[0], vjp.args_res[2:] = None, [None, None]
            return x_BTD, vjp

        layers = jnp.arange(self.model.num_hidden_layers)
        x_BTD, saved = jax.lax.scan(body, x_BTD, layers)
        return x_BTD, Forward(saved, original(self, blocks, len(layers) - 1), (rope, segment_ids_BT))

    original = Layers._gather
    config = config_of(WIDE, 8192)
    monkeypatch.setattr(Layers, "forward", forward)
    cost = estimate(compile_program(config, cluster), hardware, config, nodes=NODES, headroom=0.05)
    assert cost.hidden_share["loop"] < 0.9
