import logging

import jax
import pytest
from helpers import tiny_model

from tlite_jax.config import ExecutionConfig, MeshConfig
from tlite_jax.sharding import make_mesh
from tlite_jax.train import compile_options
from tlite_jax.train.compile_options import MARGIN


def test_options_that_this_xla_does_not_know_are_left_out_and_named(caplog):
    options = {"xla_embed_ir_in_executable": True, "xla_gpu_no_such_option": 7}
    with caplog.at_level(logging.WARNING):
        assert compile_options._known(options, jax.devices()[0]) == {"xla_embed_ir_in_executable": True}
    assert "xla_gpu_no_such_option" in caplog.text


def test_a_value_that_is_refused_is_no_unknown_option():
    with pytest.raises(Exception, match="xla_embed_ir_in_executable"):
        jax.jit(lambda x: x).lower(1.0).compile(compiler_options={"xla_embed_ir_in_executable": "neither"})


def test_a_layers_messages_are_combined_and_no_more():
    """A layer's bytes on the wire: of its weights, of its gradients, and of their shards."""
    model = tiny_model(
        hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=8, head_dim=64
    )
    layer = 4 * 512 * 512 + 3 * 512 * 1024 + 2 * 512
    execution = ExecutionConfig(reduce_dtype="float32", replica_reduce_dtype="bfloat16")
    options = compile_options._gpu(model, execution, 4)
    assert options["xla_gpu_all_gather_combine_threshold_bytes"] == 2 * layer + MARGIN
    assert options["xla_gpu_reduce_scatter_combine_threshold_bytes"] == 4 * layer + MARGIN
    assert options["xla_gpu_all_reduce_combine_threshold_bytes"] == 2 * layer // 4 + MARGIN
    assert "xla_gpu_exclude_nondeterministic_ops" not in options
    exact = compile_options._gpu(model, execution.model_copy(update={"deterministic": True}), 4)
    assert exact["xla_gpu_exclude_nondeterministic_ops"] is True


def test_cpus_are_left_alone():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert compile_options.compile_options(tiny_model(), ExecutionConfig(), mesh) == {}
