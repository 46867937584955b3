"""The step on eight emulated devices against one device, transformers with torch's AdamW, and an auto-sharded loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import QUICK, hf_model, max_difference, params_from_hf, quick_jit, random_batch, tiny_model, unpad_params
from jax.sharding import NamedSharding

from tlite_jax import optimizer as adamw
from tlite_jax.config import ExecutionConfig, MeshConfig, OptimizerConfig, ScheduleConfig
from tlite_jax.errors import UserError
from tlite_jax.loss import cross_entropy
from tlite_jax.model import decoder
from tlite_jax.sharding import BATCH_SPEC, FSDP, make_mesh, pad_params
from tlite_jax.train.state import abstract_state, init_state, shardings, start_state
from tlite_jax.train.step import check_batch, make_gradients, make_step

# The dims 131, 22, 45, 12 and 6: none divides over 8 devices, where some shards are padding alone.
MODEL = tiny_model(
    vocab_size=131,
    hidden_size=22,
    intermediate_size=45,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=6,
    attention_bias=True,
)
SPECS = decoder.param_specs(MODEL)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, eps=1e-6, weight_decay=1e-3, max_gradient_norm=0.6)
SCHEDULE = ScheduleConfig(name="cosine_with_warmup", warmup_steps=2, final_lr_fraction=0.1)
NUM_STEPS, BATCH_SIZE, LENGTH = 7, 24, 12
FLOAT32 = ExecutionConfig(compute_dtype="float32", loss_chunk_tokens=16, remat="dots")
BATCHES = [random_batch(MODEL, rows=BATCH_SIZE, length=LENGTH, seed=seed) for seed in range(NUM_STEPS)]


def mesh_of(replica, fsdp):
    return make_mesh(MeshConfig(replica=replica, fsdp=fsdp), jax.devices()[: replica * fsdp])


def place(params, mesh):
    """Logical numpy -> stored, sharded."""
    stored = pad_params(params, SPECS, mesh.shape[FSDP])
    return jax.device_put(stored, shardings(abstract_state(MODEL, mesh).params))


def train(mesh, params, execution):
    """Runs all batches. Returns the metrics of every step, and the last state."""
    schedule = adamw.make_schedule(SCHEDULE, OPTIMIZER.learning_rate, NUM_STEPS)
    step = make_step(MODEL, OPTIMIZER, execution, mesh, schedule=schedule)
    state = start_state(place(params, mesh), None, mesh)
    batches = [jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC)) for batch in BATCHES]
    compiled = step.lower(state, batches[0]).compile(compiler_options=QUICK)
    metrics = []
    for batch in batches:
        state, values = compiled(state, batch)
        metrics.append(values)
    return {name: np.array([values[name] for values in metrics]) for name in metrics[0]}, state


@pytest.fixture(scope="module")
def reference():
    return hf_model(MODEL)


@pytest.fixture(scope="module")
def start(reference):
    return params_from_hf(reference, MODEL)


@pytest.fixture(scope="module")
def one_device(start):
    metrics, state = train(mesh_of(1, 1), start, FLOAT32)
    return metrics, jax.tree.map(np.asarray, state)


def test_one_device_equals_transformers_with_torchs_adamw(reference, one_device):
    metrics, state = one_device
    decay = OPTIMIZER.weight_decay / OPTIMIZER.learning_rate
    torch_adamw = torch.optim.AdamW(
        reference.parameters(), betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps, weight_decay=decay
    )
    schedule = adamw.make_schedule(SCHEDULE, OPTIMIZER.learning_rate, NUM_STEPS)
    for t, batch in enumerate(BATCHES):
        tokens, targets = (torch.from_numpy(batch[name]).long() for name in ("tokens", "targets"))
        loss = torch.nn.functional.cross_entropy(
            reference(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=-1
        )
        torch_adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), OPTIMIZER.max_gradient_norm)
        torch_adamw.param_groups[0]["lr"] = float(schedule(t))
        torch_adamw.step()
        assert metrics["loss"][t] == pytest.approx(loss.item(), abs=2e-5)
        assert metrics["gradient_norm"][t] == pytest.approx(norm.item(), rel=1e-4)
        assert metrics["tokens"][t] == np.sum(batch["targets"] >= 0)
    assert max_difference(state.params, params_from_hf(reference, MODEL)) < 1e-4
    assert state.step == state.optimizer.num_updates == NUM_STEPS


def test_the_run_clips_warms_up_and_learns(one_device, start):
    """Or the comparisons with it would say little."""
    metrics, state = one_device
    assert np.all(metrics["gradient_norm"] > OPTIMIZER.max_gradient_norm)
    assert metrics["learning_rate"][0] == 0
    assert metrics["learning_rate"][2] == pytest.approx(1e-2)
    assert metrics["loss"][-1] < metrics["loss"][0] - 0.1
    assert max_difference(state.params, start) > 0.01


@pytest.mark.parametrize(
    ("replica", "fsdp", "num_microbatches"),
    [(1, 8, 3), (8, 1, 3), (2, 4, 1), (4, 2, 1), (1, 3, 1), (3, 2, 1), (2, 4, 3), (1, 1, 4)],
)
def test_any_mesh_and_any_microbatches_train_as_one_device(replica, fsdp, num_microbatches, one_device, start):
    execution = FLOAT32.model_copy(update={"num_microbatches": num_microbatches})
    metrics, state = train(mesh_of(replica, fsdp), start, execution)
    expected, expected_state = one_device
    np.testing.assert_allclose(metrics["loss"], expected["loss"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(metrics["gradient_norm"], expected["gradient_norm"], rtol=2e-5)
    np.testing.assert_array_equal(metrics["tokens"], expected["tokens"])
    # Two programs may round a cosine differently, by one unit in the last place.
    np.testing.assert_allclose(metrics["learning_rate"], expected["learning_rate"], rtol=1e-7, atol=0)
    final, moments = jax.tree.map(np.asarray, (state.params, state.optimizer))
    assert max_difference(unpad_params(final, SPECS), expected_state.params) < 5e-5
    assert max_difference(unpad_params(moments.mu, SPECS), expected_state.optimizer.mu) < 1e-6
    for stored in (final, moments.mu, moments.nu):
        erased = pad_params(unpad_params(stored, SPECS), SPECS, fsdp)
        assert max_difference(stored, erased) == 0, "the padding is no longer zero"
    for leaf in jax.tree.leaves((state.params, state.optimizer.mu)):
        assert leaf.dtype == jnp.float32
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * fsdp == leaf.size


def test_gradients_equal_an_auto_sharded_loss(start):
    """The oracle knows no collectives: XLA's partitioner places them from the arrays' shardings."""
    mesh = mesh_of(2, 4)
    batch = random_batch(MODEL, rows=BATCH_SIZE, length=LENGTH, documents=True)
    batch = jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC))
    params = place(start, mesh)

    def mean_loss(stored):
        model = nnx.merge(decoder.graphdef(MODEL), unpad_params(stored, SPECS))
        hidden, head = model(batch["tokens"], batch["segment_ids"])
        loss, count = cross_entropy(hidden, head, batch["targets"], chunk_tokens=10_000)
        return loss / count

    expected_loss, expected = quick_jit(jax.value_and_grad(mean_loss))(params)
    execution = FLOAT32.model_copy(update={"num_microbatches": 3})
    gradients, rows = quick_jit(make_gradients(MODEL, execution, mesh, document_masking=True))(params, batch)
    loss, count = np.asarray(rows).sum(axis=0)
    assert count == np.sum(batch["targets"] >= 0)
    assert float(loss / count) == pytest.approx(float(expected_loss), abs=1e-5)
    largest = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
    means = jax.tree.map(lambda gradient: gradient / count, gradients)
    assert max_difference(means, expected) < 3e-6 * largest


def test_bfloat16_trains_close_to_float32(one_device, start):
    """Seven steps of a two-layer model: losses within 0.02 nats, norms within 3%; masters stay float32."""
    execution = FLOAT32.model_copy(update={"compute_dtype": "bfloat16", "reduce_dtype": "bfloat16"})
    metrics, state = train(mesh_of(2, 4), start, execution)
    expected, _ = one_device
    assert 0 < np.max(np.abs(metrics["loss"] - expected["loss"])) < 0.02
    np.testing.assert_allclose(metrics["gradient_norm"], expected["gradient_norm"], rtol=0.03)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.optimizer.nu))} == {jnp.float32.dtype}


def test_a_seed_gives_the_same_bits_on_a_mesh_as_without():
    model = tiny_model(vocab_size=67, tie_word_embeddings=True)
    specs = decoder.param_specs(model)
    state = jax.tree.map(np.asarray, init_state(model, mesh_of(2, 4), seed=3))
    expected = jax.jit(lambda: decoder.init_params(model, 3))()
    assert max_difference(unpad_params(state.params, specs), expected) == 0
    assert max_difference(state.params, pad_params(expected, specs, 4)) == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves((state.step, state.optimizer)))


@pytest.mark.parametrize(
    ("batch_size", "num_microbatches", "fits"),
    [(20, 1, "use 16 or 24"), (24, 2, "use 16 or 32"), (7, 1, "use 8"), (8, 3, "use 24")],
)
def test_a_batch_that_cannot_be_dealt_out_names_sizes_that_can(batch_size, num_microbatches, fits):
    with pytest.raises(UserError, match=f"8 devices x {num_microbatches} microbatches.*{fits}$"):
        check_batch(batch_size, mesh_of(2, 4), num_microbatches)
    check_batch(int(fits.split()[-1]), mesh_of(2, 4), num_microbatches)
