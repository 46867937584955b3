"""KL(base || now) from the base's most likely tokens: exact with all of them, a lower bound with fewer."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_model

from tlite_jax.config import ExecutionConfig, MeshConfig
from tlite_jax.data.buckets import HeldOutBucket, HeldOutDocument
from tlite_jax.errors import UserError
from tlite_jax.evaluate.bits_per_byte import NotFiniteError
from tlite_jax.evaluate.divergence import DivergenceMeter, _even_quotas, replay_sample
from tlite_jax.evaluate.rows import Boundaries
from tlite_jax.model import decoder
from tlite_jax.model.layers import linear
from tlite_jax.sharding import make_mesh, num_shards, pad_params
from tlite_jax.train.state import abstract_state, shardings

MODEL = tiny_model()
V, LENGTH = MODEL.vocab_size, 16
EXECUTION = ExecutionConfig(compute_dtype="float32", loss_chunk_tokens=24)
BOUNDARIES = Boundaries(1, None)
ONE = MeshConfig()


def make_buckets() -> list[HeldOutBucket]:
    rng = np.random.default_rng(0)
    sizes = {"a": [9, 40, 3], "b": [5], "c": [16, 17]}
    return [
        HeldOutBucket(
            name,
            {},
            False,
            [HeldOutDocument(np.array([1, *rng.integers(3, V, size)], np.uint32), size) for size in lengths],
        )
        for name, lengths in sizes.items()
    ]


def sample(num_tokens: int = 60):
    return replay_sample(make_buckets(), BOUNDARIES, num_tokens=num_tokens, length=LENGTH)


@functools.cache
def params(seed: int) -> dict:
    return jax.tree.map(np.asarray, decoder.init_params(MODEL, seed))


def moved(by: float) -> dict:
    return jax.tree.map(lambda a, b: a + np.float32(by) * b, params(0), params(1))


def stored(tree: dict, mesh) -> dict:
    padded = pad_params(tree, decoder.param_specs(MODEL), num_shards(mesh))
    return jax.device_put(padded, shardings(abstract_state(MODEL, mesh).params))


def measure(directory, base, now, *, top_k, mesh_config=ONE, batch_size=2, tokens=60):
    size = mesh_config.replica * (mesh_config.fsdp or 1) * mesh_config.context
    mesh = make_mesh(mesh_config, jax.devices()[:size])
    meter = DivergenceMeter(MODEL, EXECUTION, mesh, sample=sample(tokens), batch_size=batch_size, directory=directory)
    if base is not None:
        meter.write_base(stored(base, mesh), MODEL, top_k, writes=True)
    meter.open_base()
    return meter.measure(stored(now, mesh))


def direct(base, now) -> dict[str, float]:
    """The whole divergence in float64, window by window, without packing, chunks or a mesh."""

    @jax.jit
    def log_probabilities(tree, tokens_T):
        hidden, head = nnx.merge(decoder.graphdef(MODEL), tree)(tokens_T[None])
        return jax.nn.log_softmax(linear(hidden, head))[0]

    result = dict.fromkeys("abc", 0.0)
    replay = sample()
    for window in replay.packing.windows:
        size = len(window.inputs)
        padded = np.pad(window.inputs, (0, LENGTH - size))
        p, q = (np.asarray(log_probabilities(tree, padded), np.float64)[:size] for tree in (base, now))
        result[replay.names[window.owner]] += float(np.sum(np.exp(p) * (p - q)))
    return result


@pytest.fixture(scope="module")
def whole() -> dict[str, float]:
    return direct(params(0), moved(0.3))


def test_with_the_whole_vocabulary_it_is_the_whole_divergence(tmp_path, whole):
    found = measure(tmp_path, params(0), moved(0.3), top_k=V)
    assert {name: part.nats for name, part in found.items()} == pytest.approx(whole, rel=1e-5)
    assert {name: part.num_tokens for name, part in found.items()} == {"a": 28, "b": 5, "c": 27}
    assert found["a"].per_token == pytest.approx(whole["a"] / 28, rel=1e-5)


def test_fewer_tokens_give_a_lower_bound_that_rises_with_them(tmp_path, whole):
    found = [measure(tmp_path / str(k), params(0), moved(0.3), top_k=k) for k in (4, 64)]
    for name, expected in whole.items():
        bounds = [part[name].nats for part in found]
        assert 0 < bounds[0] < bounds[1] < expected * 0.999
        assert bounds[1] > 0.5 * expected


def test_the_base_has_moved_nowhere(tmp_path):
    found = measure(tmp_path, params(0), params(0), top_k=8)
    for part in found.values():
        assert part.per_token == pytest.approx(0, abs=1e-6)
    broken = {**params(0), "final_norm": params(0)["final_norm"] * np.nan}
    with pytest.raises(NotFiniteError, match=r"KL\(base \|\| now\) on held-out bucket a is nan"):
        measure(tmp_path, None, broken, top_k=8)


def test_meshes_and_batches_agree_and_read_each_others_base(tmp_path):
    expected = measure(tmp_path, params(0), moved(0.3), top_k=8)
    meshes = MeshConfig(replica=2, fsdp=2, context=2), MeshConfig(fsdp=3)
    read = measure(tmp_path, None, moved(0.3), top_k=8, mesh_config=meshes[0], batch_size=7)
    written = measure(tmp_path / "own", params(0), moved(0.3), top_k=8, mesh_config=meshes[1])
    for name, part in expected.items():
        assert read[name].nats == pytest.approx(part.nats, rel=1e-5)
        assert written[name].nats == pytest.approx(part.nats, rel=1e-5)
        assert read[name].num_tokens == written[name].num_tokens == part.num_tokens


def test_a_sample_takes_evenly_what_there_is():
    assert _even_quotas([52, 5, 33], 60) == [28, 5, 27]
    assert _even_quotas([52, 5, 33], 90) == [52, 5, 33]
    assert _even_quotas([10, 10, 10], 1) == [0, 0, 1]
    assert sum(len(window.inputs) for window in sample(41).packing.windows) == 41
    with pytest.raises(UserError, match=r"evaluation.kl.tokens 91 is more than the 90 held-out tokens of the 3"):
        sample(91)


def test_a_base_that_is_not_finite_is_refused(tmp_path):
    broken = {**params(0), "final_norm": params(0)["final_norm"] * np.nan}
    with pytest.raises(NotFiniteError, match="row 0 of the replay sample"):
        measure(tmp_path, broken, params(0), top_k=8)
