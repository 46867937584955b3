"""The written-out forward and backward against autodiff of the plain model, and what each remat policy repeats."""

import jax
import jax.extend
import numpy as np
import pytest
from flax import nnx
from helpers import ROPE_SCALING, max_difference, quick_jit, random_batch, tiny_model, unpad_params
from jax.sharding import NamedSharding

from tlite_jax.config import ExecutionConfig, MeshConfig
from tlite_jax.errors import UserError
from tlite_jax.loss import cross_entropy
from tlite_jax.model import attention_xla, decoder
from tlite_jax.sharding import BATCH_SPEC, make_mesh, num_shards, pad_params
from tlite_jax.train.context import check_context
from tlite_jax.train.state import abstract_state, shardings
from tlite_jax.train.step import make_gradients

CONFIGS = {
    "everything": tiny_model(
        head_dim=16, rope_scaling=ROPE_SCALING, attention_bias=True, tie_word_embeddings=True, num_key_value_heads=1
    ),
    "one_layer": tiny_model(num_hidden_layers=1),
    "three_layers": tiny_model(num_hidden_layers=3, attention_bias=True),
    "five_layers_tied": tiny_model(num_hidden_layers=5, tie_word_embeddings=True),
}


def gradients_of(config, params, batch, *, replica=1, fsdp=1, context=1, **execution):
    """Logical gradients of the summed loss, the loss and the count."""
    mesh = MeshConfig(replica=replica, fsdp=fsdp, context=context)
    mesh = make_mesh(mesh, jax.devices()[: replica * fsdp * context])
    specs = decoder.param_specs(config)
    stored = jax.device_put(pad_params(params, specs, num_shards(mesh)), shardings(abstract_state(config, mesh).params))
    batch = jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC))
    execution = ExecutionConfig(**{"compute_dtype": "float32", "loss_chunk_tokens": 32, **execution})
    function = make_gradients(config, execution, mesh, document_masking="segment_ids" in batch)
    gradients, rows = quick_jit(function)(stored, batch)
    loss, count = np.asarray(rows).sum(axis=0)
    return unpad_params(jax.tree.map(np.asarray, gradients), specs), float(loss), float(count)


def expected_of(config, params, batch):
    """The same from autodiff through the decoder, on one device."""

    def summed(params):
        hidden, head = nnx.merge(decoder.graphdef(config), params)(batch["tokens"], batch.get("segment_ids"))
        return cross_entropy(hidden, head, batch["targets"], chunk_tokens=10_000)

    (loss, count), gradients = quick_jit(
        lambda params: (summed(params), jax.grad(lambda params: summed(params)[0])(params))
    )(params)
    return gradients, float(loss), float(count)


def random_params(config):
    params = quick_jit(lambda: decoder.init_params(config, 0))()
    noise = np.random.default_rng(0)  # biases and norms too
    return jax.tree.map(lambda leaf: np.asarray(leaf) + 0.05 * noise.normal(size=leaf.shape).astype("f4"), params)


@pytest.mark.parametrize(
    ("name", "replica", "fsdp", "execution"),
    [
        ("everything", 1, 1, {"remat": "none", "attention": "xla"}),
        ("everything", 1, 1, {"remat": "dots", "attention": "xla_chunked"}),
        ("everything", 2, 2, {"remat": "full", "attention": "xla", "num_microbatches": 3}),
        ("everything", 1, 1, {"remat": "attention", "attention": "xla_chunked"}),
        ("one_layer", 2, 2, {"num_microbatches": 3}),
        ("one_layer", 1, 1, {}),
        ("three_layers", 4, 1, {"num_microbatches": 3}),
        ("three_layers", 1, 4, {"remat": "none"}),
        ("three_layers", 2, 2, {"remat": "offload"}),
        ("five_layers_tied", 2, 2, {"num_microbatches": 1}),
    ],
)
def test_gradients_equal_autodiff_of_the_plain_model(name, replica, fsdp, execution, monkeypatch):
    monkeypatch.setattr(attention_xla, "CHUNK", 8)
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    batch = random_batch(config, rows=12, length=24, documents=True)
    gradients, loss, count = gradients_of(config, params, batch, replica=replica, fsdp=fsdp, **execution)
    expected, expected_loss, expected_count = expected_of(config, params, batch)
    assert count == expected_count
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    largest = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
    assert max_difference(gradients, expected) < 3e-6 * largest


@pytest.mark.parametrize(
    ("replica", "fsdp", "context", "documents"), [(1, 1, 2, True), (2, 1, 4, False), (1, 2, 4, True)]
)
def test_a_sequence_split_over_devices_gives_the_same(replica, fsdp, context, documents):
    config = tiny_model(num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3, rope_scaling=None)
    params = random_params(config)
    batch = random_batch(config, rows=4, length=24, documents=documents)
    found = gradients_of(config, params, batch, replica=replica, fsdp=fsdp, context=context, num_microbatches=2)
    gradients, loss, count = found
    expected, expected_loss, expected_count = expected_of(config, params, batch)
    assert count == expected_count
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    largest = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
    assert max_difference(gradients, expected) < 3e-6 * largest


@pytest.mark.parametrize(
    ("context", "length", "mend"),
    [
        (3, 24, "does not divide the model's 4 kv heads; use one of 1, 2, 4"),
        (4, 26, "does not divide data.sequence_length 26"),
    ],
)
def test_a_context_that_cannot_be_dealt_out_is_refused(context, length, mend):
    config = tiny_model(num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(UserError, match=mend):
        check_context(config, context, length)
    check_context(config, 2, 24)


def test_frequent_tokens_gradients_are_summed_in_float32():
    """A token that is everywhere: sums of thousands of bfloat16 values in bfloat16 would lose most of them."""
    config = tiny_model(num_hidden_layers=1)
    params = random_params(config)
    batch = random_batch(config, rows=16, length=128)
    batch["tokens"][:] = 7
    exact, *_ = expected_of(config, params, batch)
    gradients, *_ = gradients_of(config, params, batch, compute_dtype="bfloat16")
    row, other = gradients["embedding"][7], np.asarray(exact["embedding"][7])
    assert np.linalg.norm(row - other) < 0.03 * np.linalg.norm(other)
    assert np.all(np.delete(gradients["embedding"], 7, axis=0) == 0)


@pytest.mark.parametrize("fp8", [False, True])
def test_remat_policies_repeat_what_they_say(fp8):
    """Matrix products traced in one layer's forward and backward: seven linear layers, attention has two of its own."""
    if fp8:
        pytest.importorskip("qwix", reason="the extra fp8 is not installed")
    config = tiny_model(num_hidden_layers=1)
    batch = random_batch(config, rows=1, length=16)
    params = jax.eval_shape(lambda: decoder.init_params(config, 0))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def products(remat):
        execution = ExecutionConfig(remat=remat, attention="xla", compute_dtype="float32", fp8=fp8)
        jaxpr = jax.make_jaxpr(make_gradients(config, execution, mesh, document_masking=False))(params, batch)
        return str(jaxpr).count("dot_general[")

    none, dots, attention, full = (products(remat) for remat in ("none", "dots", "attention", "full"))
    assert dots == none + 1  # the scores; the weighted sum is kept
    assert attention == dots + 6  # `down` is needed by nobody
    assert full == attention + 1


@pytest.mark.parametrize("fp8", [False, True])
def test_weights_are_not_kept_for_the_backward_pass(fp8):
    """Whatever the policy, what the layers hand to the backward pass has no array of the size of their weights."""
    if fp8:
        pytest.importorskip("qwix", reason="the extra fp8 is not installed")
    config = tiny_model(num_hidden_layers=6, intermediate_size=1000)
    batch = random_batch(config, rows=2, length=8)
    params = jax.eval_shape(lambda: decoder.init_params(config, 0))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for remat in ("none", "dots", "full"):
        execution = ExecutionConfig(remat=remat, compute_dtype="bfloat16", attention="xla", fp8=fp8)
        jaxpr = jax.make_jaxpr(make_gradients(config, execution, mesh, document_masking=False))(params, batch)
        stacks = {
            (variable.aval.dtype.name, variable.aval.shape)
            for equation in _equations(jaxpr.jaxpr)
            if equation.primitive.name == "scan" and equation.params["length"] == 6
            for variable in equation.outvars
        }
        assert stacks
        assert not [shape for dtype, shape in stacks if shape[1:] in ((1000, 24), (24, 1000)) and dtype != "float32"]


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _equations(inner)
