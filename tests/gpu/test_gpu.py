"""The step, its collectives and the attention kernels on the devices of this machine.

`make test-gpu` runs it over NCCL on all GPUs that there are (one is enough for the kernels, two for the rest); `make
test` on emulated CPU devices, where it is the test that this file works.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, max_difference, random_batch, tiny_model, unpad_params
from jax.sharding import NamedSharding, PartitionSpec
from model.attention_reference import inputs, reference, with_gradients

from launch.doctor_parts.interconnect import measure
from tests import tiny
from tlite_jax.config import ExecutionConfig, MeshConfig, OptimizerConfig, ScheduleConfig
from tlite_jax.errors import UserError
from tlite_jax.model import attention
from tlite_jax.model.decoder import param_specs
from tlite_jax.optimizer import make_schedule
from tlite_jax.sharding import BATCH_SPEC, DEVICES, make_mesh
from tlite_jax.train.state import init_state
from tlite_jax.train.step import make_step

ON_GPU = os.environ.get("TLITE_TEST_GPU") == "1"
try:
    jax.devices()
except (RuntimeError, AssertionError) as error:
    pytest.exit(f"jax finds no GPU here ({error}); `python -m launch doctor` says more", returncode=1)
NUM_DEVICES = len(jax.devices()) // 2 * 2 or 1  # an odd one is left out
ALL = jax.devices()[:NUM_DEVICES]
LENGTH, STEPS = (128 if ON_GPU else 32), 3

needs_two = pytest.mark.skipif(NUM_DEVICES < 2, reason="one device has nobody to talk to")


def meshes() -> list[MeshConfig]:
    """Full shard, replicas, a context axis, hybrid shard; of emulated devices the last alone: they have other tests."""
    n = max(NUM_DEVICES, 2)
    wanted = list(dict.fromkeys([(1, n, 1), (n, 1, 1), (1, n // 2, 2), (2, n // 2, 1)]))
    chosen = wanted if ON_GPU else wanted[-1:]
    return [MeshConfig(replica=replica, fsdp=fsdp, context=context) for replica, fsdp, context in chosen]


def model():
    """Of a head size that the kernels take; 1001 rows divide over no number of GPUs."""
    return tiny_model(
        vocab_size=1001,
        hidden_size=296,
        intermediate_size=520,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )


def train(mesh: jax.sharding.Mesh, *, dtype: str, documents: bool) -> tuple[list[float], list[float], dict]:
    """Losses, gradient norms and Adam's first moments after a few steps of two microbatches."""
    execution = ExecutionConfig(compute_dtype=dtype, num_microbatches=2, remat="full", loss_chunk_tokens=256)
    schedule = make_schedule(ScheduleConfig(name="constant_with_warmup", warmup_steps=0), 1e-5, STEPS)
    optimizer = OptimizerConfig(learning_rate=1e-5, weight_decay=1e-3)
    step = make_step(model(), optimizer, execution, mesh, schedule=schedule, document_masking=documents)
    state = init_state(model(), mesh, seed=1)
    rows = 4 * NUM_DEVICES  # in all meshes the same
    made = [random_batch(model(), rows=rows, length=LENGTH, seed=seed, documents=documents) for seed in range(STEPS)]
    batches = [jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC)) for batch in made]
    if not ON_GPU:
        step = step.lower(state, batches[0]).compile(compiler_options=QUICK)
    losses, norms = [], []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["gradient_norm"]))
    return losses, norms, jax.tree.map(np.asarray, unpad_params(state.optimizer.mu, param_specs(model())))


@pytest.fixture(scope="module")
def exact():
    """Three steps in float32 on one device: of products that are not rounded to TF32."""
    with jax.default_matmul_precision("highest"):
        return train(make_mesh(MeshConfig(fsdp=1), ALL[:1]), dtype="float32", documents=True)


@needs_two
@pytest.mark.parametrize("config", meshes(), ids=lambda mesh: f"{mesh.replica}x{mesh.fsdp}x{mesh.context}")
def test_a_sharded_step_equals_one_device(config, exact):
    losses, norms, moments = exact
    mesh = make_mesh(config, ALL)
    with jax.default_matmul_precision("highest"):
        found_losses, found_norms, found_moments = train(mesh, dtype="float32", documents=True)
    np.testing.assert_allclose(found_losses, losses, rtol=1e-6)
    np.testing.assert_allclose(found_norms, norms, rtol=2e-5)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(moments))
    assert max_difference(found_moments, moments) < 2e-5 * largest


@pytest.mark.parametrize("documents", [False, True] if ON_GPU else [True])
def test_a_step_in_bfloat16_with_the_chosen_kernel_is_near_float32(documents, exact):
    mesh = make_mesh(MeshConfig(), ALL)
    losses, norms, _ = train(mesh, dtype="bfloat16", documents=documents)
    if documents:
        expected_losses, expected_norms, _ = exact
    else:
        with jax.default_matmul_precision("highest"):
            expected_losses, expected_norms, _ = train(mesh, dtype="float32", documents=False)
    np.testing.assert_allclose(losses, expected_losses, rtol=5e-3)
    np.testing.assert_allclose(norms, expected_norms, rtol=5e-2)


@needs_two
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_collectives_move_and_add_what_they_should(dtype):
    mesh = make_mesh(MeshConfig(), ALL)
    rows = NUM_DEVICES * 16  # a row is its number: sums stay exact in bfloat16 up to 256 a row
    x = np.arange(rows * 8, dtype=np.float32).reshape(rows, 8) % 7
    local = PartitionSpec(DEVICES)

    def run(function, out_specs):
        call = jax.shard_map(function, mesh=mesh, in_specs=local, out_specs=out_specs, check_vma=False)
        placed = jax.device_put(jnp.asarray(x, dtype), NamedSharding(mesh, local))
        return np.asarray(jax.jit(call)(placed), np.float32)

    parts = x.reshape(NUM_DEVICES, -1, 8)
    whole = PartitionSpec()
    np.testing.assert_array_equal(run(lambda y: jax.lax.all_gather(y, DEVICES, tiled=True), whole), x)
    np.testing.assert_array_equal(run(lambda y: jax.lax.psum(y, DEVICES), whole), parts.sum(axis=0))
    scattered = run(lambda y: jax.lax.psum_scatter(y, DEVICES, tiled=True), local)
    np.testing.assert_array_equal(scattered, parts.sum(axis=0))


@needs_two
def test_the_links_have_a_rate(capsys):
    rates = measure(make_mesh(MeshConfig(), ALL))
    with capsys.disabled():
        for rate in rates if ON_GPU else []:
            print(f"\n{rate.collective} over {rate.group_size} devices: {rate.bytes_per_second / 1e9:.1f} GB/s")
    assert {rate.collective for rate in rates} == {"all-gather", "reduce-scatter", "all-reduce"}
    assert all(rate.bytes_per_second > 0 for rate in rates)


@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", sorted(attention.BACKENDS))
def test_a_kernel_equals_float64(name, head_dim, documents):
    """Output and gradients in bfloat16, to what rounding inputs, weights and output to 8 bits gives."""
    shape = {"sequence_length": LENGTH, "head_dim": head_dim}
    try:
        attend = attention.select_for(jax.devices()[0], name, dtype="bfloat16", document_masking=documents, **shape)
    except UserError as reason:
        pytest.skip(str(reason))
    arrays = inputs(length=LENGTH, heads=4, kv_heads=2, documents=documents, head_dim=head_dim)
    q, k, v, segments, upstream = arrays
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    rounded = [np.asarray(x, np.float64) for x in half]
    half_upstream = jnp.asarray(upstream, jnp.bfloat16)
    expected = reference(*rounded, segments, np.asarray(half_upstream, np.float64))
    placed = None if segments is None else jnp.asarray(segments)
    # Rows of padding (segment 0) are nobody's: kernels may write there what they like.
    kept = np.ones(q.shape[:2], bool) if segments is None else segments > 0
    found = jax.jit(lambda *given: with_gradients.__wrapped__(attend, *given))(*half, placed, half_upstream)
    for part, ours, theirs in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        difference = np.abs(np.asarray(ours, np.float64) - theirs)[kept]
        assert difference.max() < 2**-6 * np.abs(theirs).max(), part


@pytest.mark.skipif(not ON_GPU or NUM_DEVICES < 2, reason="a GPU for each of two processes")
def test_two_processes_equal_one(tmp_path):
    """`launch train`: a process for each of two GPUs against one process with both."""
    config = tiny.write_config(tmp_path / "run.yaml", tmp_path / "unused")
    command = [sys.executable, "-m", "launch", "train", str(config), "execution.attention=xla"]
    environment = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}

    def start(output: str, gpus: str, *words: str) -> subprocess.Popen:
        full = [*command, f"output={tmp_path / output}", *words]
        return subprocess.Popen(full, env={**environment, "CUDA_VISIBLE_DEVICES": gpus})

    joined = ["--coordinator", "127.0.0.1:29517", "--num-processes", "2", "--process-id"]
    two = [start("two", str(number), *joined, str(number)) for number in range(2)]
    assert [process.wait(300) for process in two] == [0, 0]
    assert start("one", "0,1").wait(300) == 0
    one = tiny.metrics(tmp_path / "one")
    assert len(one) == tiny.STEPS
    assert tiny.metrics(tmp_path / "two") == pytest.approx(one, rel=1e-6)
