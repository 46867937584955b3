"""KL(base || now) from the base's most likely tokens: exact with all of them, a lower bound with fewer."""

import jax
import numpy as np
import pytest
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


def params(seed: int) -> dict:
    return decoder.init_params(MODEL, seed)


def moved(by: float) -> dict:
    return jax.tree.map(lambda a, b: a + by * b, params(0), params(1))


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
    from flax import nnx

    def log_probabilities(tree, tokens):
        hidden, head = nnx.merge(decoder.graphdef(MODEL), tree)(tokens[None])
        return jax.nn.log_softmax(linear(hidden, head))[0]

    compiled = jax.jit(log_probabilities)
    result = dict.fromkeys("abc", 0.0)
    replay = sample()
    for window in replay.packing.windows:
        p, q = (np.asarray(compiled(tree, window.inputs), np.float64) for tree in (base, now))
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
    found = [measure(tmp_path / str(k), params(0), moved(0.3), top_k=k) for k in (1, 8, 64, V - 1)]
    for name, expected in whole.items():
        bounds = [part[name].nats for part in found]
        assert bounds == sorted(bounds)
        assert bounds[0] > 0
        assert bounds[-1] <= expected * (1 + 1e-6)
        assert bounds[-2] < expected * 0.999
        assert bounds[-1] == pytest.approx(expected, rel=1e-2)


def test_the_base_has_moved_nowhere(tmp_path):
    found = measure(tmp_path, params(0), params(0), top_k=8)
    for part in found.values():
        assert part.per_token == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 2, 2), (8, 1, 1)])
def test_meshes_and_batches_agree_and_read_each_others_base(tmp_path, shape):
    replica, fsdp, context = shape
    config = MeshConfig(replica=replica, fsdp=fsdp, context=context)
    expected = measure(tmp_path, params(0), moved(0.3), top_k=8)
    read = measure(tmp_path, None, moved(0.3), top_k=8, mesh_config=config, batch_size=7)
    written = measure(tmp_path / "own", params(0), moved(0.3), top_k=8, mesh_config=config)
    for name, part in expected.items():
        assert read[name].nats == pytest.approx(part.nats, rel=1e-5)
        assert written[name].nats == pytest.approx(part.nats, rel=1e-5)
        assert read[name].num_tokens == part.num_tokens


def test_a_sample_takes_evenly_what_there_is():
    assert _even_quotas([52, 5, 33], 60) == [28, 5, 27]
    assert _even_quotas([52, 5, 33], 90) == [52, 5, 33]
    assert _even_quotas([10, 10, 10], 1) == [0, 0, 1]
    assert sum(len(window.inputs) for window in sample(41).packing.windows) == 41
    with pytest.raises(UserError, match=r"evaluation.kl.tokens 91 is more than the 90 held-out tokens of the 3"):
        sample(91)


def test_not_finite_names_the_bucket(tmp_path):
    broken = params(0)
    broken["final_norm"] = broken["final_norm"] * np.nan
    with pytest.raises(NotFiniteError, match=r"KL\(base \|\| now\) on held-out bucket a is nan"):
        measure(tmp_path, params(0), broken, top_k=8)
    with pytest.raises(NotFiniteError, match="row 0 of the replay sample"):
        measure(tmp_path, broken, params(0), top_k=8)
