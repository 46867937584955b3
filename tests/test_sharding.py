import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import max_difference, quick_jit, tiny_model, unpad_params
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from tlite_jax.config import ExecutionConfig, MeshConfig
from tlite_jax.errors import UserError
from tlite_jax.model import decoder
from tlite_jax.model.decoder import ParamSpec
from tlite_jax.sharding import (
    Collectives,
    abstract_params,
    make_gather,
    make_mesh,
    pad_params,
    padded_shape,
    partition_spec,
    place_params,
)

MODEL = tiny_model(attention_bias=True)
SPECS = decoder.param_specs(MODEL)


@pytest.mark.parametrize(
    ("replica", "fsdp", "shape"), [(1, None, (1, 8)), (2, None, (2, 4)), (8, None, (8, 1)), (4, 2, (4, 2))]
)
def test_consecutive_devices_share_an_fsdp_group(replica, fsdp, shape):
    mesh = make_mesh(MeshConfig(replica=replica, fsdp=fsdp))
    assert mesh.axis_names == ("replica", "fsdp", "context")
    assert mesh.devices.shape == (*shape, 1)
    assert [device.id for device in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize(("replica", "fsdp"), [(3, None), (2, 2), (16, None), (1, 16)])
def test_a_mesh_that_does_not_fit_names_those_that_do(replica, fsdp):
    with pytest.raises(UserError, match=r"found 8; replica x fsdp that fit: 8 x 1, 4 x 2, 2 x 4, 1 x 8$"):
        make_mesh(MeshConfig(replica=replica, fsdp=fsdp))


@given(size=st.integers(1, 200), shards=st.integers(1, 96), stacked=st.booleans())
def test_padding_is_the_least_that_divides(size, shards, stacked):
    spec = ParamSpec((4, size, 7), ("mlp", "embed")) if stacked else ParamSpec((size, 7), ("vocab", "embed"))
    stored = padded_shape(spec, shards)[spec.sharded_dim]
    assert stored % shards == 0
    assert size <= stored < size + shards
    assert padded_shape(spec, shards)[spec.sharded_dim + 1 :] == (7,)


@pytest.mark.parametrize(("replica", "dtype"), [(1, "float32"), (2, "bfloat16")])
def test_host_arrays_are_placed_in_their_shards(replica, dtype):
    mesh = make_mesh(MeshConfig(replica=replica))
    params = jax.tree.map(np.asarray, decoder.init_params(MODEL, 0))
    placed = place_params(params, SPECS, mesh, dtype)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), placed)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract_params(SPECS, mesh, dtype))
    expected = jax.tree.map(lambda x: x.astype(dtype), pad_params(params, SPECS, 8 // replica))
    assert max_difference(placed, expected) == 0


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_unpadding_inverts_padding(shards):
    params = jax.tree.map(
        lambda spec: np.random.default_rng(0).normal(size=spec.shape).astype(np.float32),
        SPECS,
        is_leaf=lambda leaf: isinstance(leaf, ParamSpec),
    )
    stored = pad_params(params, SPECS, shards)
    assert max_difference(unpad_params(stored, SPECS), params) == 0
    totals = [jax.tree.map(lambda x: np.sum(np.abs(x), dtype=np.float64), tree) for tree in (params, stored)]
    assert max_difference(*totals) < 1e-9


def test_abstract_parameters_are_placed_without_being_made():
    mesh = make_mesh(MeshConfig(replica=2))
    abstract = abstract_params(SPECS, mesh)
    gate = abstract["blocks"]["gate"]
    assert gate.shape == (2, 40, 24)
    assert gate.sharding == NamedSharding(mesh, PartitionSpec(None, ("fsdp", "context")))
    assert abstract["embedding"].shape == (132, 24)
    assert abstract["embedding"].sharding == NamedSharding(mesh, PartitionSpec(("fsdp", "context")))
    for leaf in jax.tree.leaves(abstract):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        # Every parameter takes a quarter of a device group's memory, the smallest norm included.
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 == np.prod(leaf.shape)


def gather_and_scatter(mesh, size, compute_dtype, reduce_dtype):
    """(stored [P, 3], gradient [devices, size, 3]) -> what each device gathers, and its shard of the sum."""
    execution = ExecutionConfig(compute_dtype=compute_dtype, reduce_dtype=reduce_dtype)
    collectives = Collectives.of(mesh, execution)
    spec = ParamSpec((size, 3), ("vocab", "embed"))
    gather = make_gather({"vocab": size}, collectives)

    def local(shard, gradient):
        whole = collectives.gather({"p": shard}, {"p": spec})["p"]
        hooked = gather({"p": nnx.Param(shard, axes=spec.axes)})["p"][...]
        scattered = collectives.scatter({"p": gradient[0].astype(compute_dtype)}, {"p": spec})["p"]
        return whole[None], hooked[None], scattered[None]

    devices = PartitionSpec(("replica", "fsdp"))
    specs = {"in_specs": (partition_spec(spec), devices), "out_specs": (devices, devices, devices)}
    return quick_jit(jax.shard_map(local, mesh=mesh, **specs, check_vma=False))


@pytest.mark.parametrize(("replica", "fsdp"), [(1, 8), (2, 4), (8, 1)])
def test_gather_collects_and_scatter_sums_within_a_group(replica, fsdp):
    size = 13
    mesh = make_mesh(MeshConfig(replica=replica, fsdp=fsdp))
    rng = np.random.default_rng(0)
    param = rng.normal(size=(size, 3)).astype(np.float32)
    stored = np.pad(param, ((0, -size % fsdp), (0, 0)))
    cotangent = rng.normal(size=(8, size, 3)).astype(np.float32)
    whole, hooked, gradient = gather_and_scatter(mesh, size, "float32", "float32")(stored, cotangent)
    assert np.array_equal(whole, hooked)
    assert np.array_equal(whole, np.tile(param, (8, 1, 1)))
    for group in range(replica):
        members = slice(group * fsdp, (group + 1) * fsdp)
        summed = np.concatenate(gradient[members])
        np.testing.assert_allclose(summed[:size], cotangent[members].sum(axis=0), atol=1e-6)
        assert np.all(summed[size:] == 0)


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_gradients_of_bfloat16_weights_are_reduced_in_the_reduce_dtype(reduce_dtype):
    mesh = make_mesh(MeshConfig(fsdp=8))
    rng = np.random.default_rng(0)
    param = rng.normal(size=(16, 3)).astype(np.float32)
    # Sums of eight bfloat16 values that float32 holds exactly and bfloat16 does not.
    cotangent = (1 + rng.integers(0, 128, (8, 16, 3)) / 128).astype(np.float32)
    whole, _, gradient = gather_and_scatter(mesh, 16, "bfloat16", reduce_dtype)(param, cotangent)
    assert whole.dtype == jnp.bfloat16
    assert np.array_equal(whole[3], param.astype(jnp.bfloat16))
    assert gradient.dtype == jnp.float32
    error = np.max(np.abs(np.concatenate(gradient) - cotangent.sum(axis=0)))
    if reduce_dtype == "float32":
        assert error == 0
    else:
        assert 0 < error <= 16 * 2**-8 * 2


@pytest.mark.parametrize("replica_dtype", ["float32", "bfloat16"])
def test_replicas_are_summed_in_the_dtype_asked_for(replica_dtype):
    mesh = make_mesh(MeshConfig(replica=4, fsdp=2))
    collectives = Collectives.of(mesh, ExecutionConfig(replica_reduce_dtype=replica_dtype))
    devices = PartitionSpec(("replica", "fsdp"))
    values = np.repeat(1 + np.arange(4, dtype=np.float32) / 512, 2).reshape(8, 1)  # the replica's, on both its shards
    function = jax.shard_map(collectives.sum_replicas, mesh=mesh, in_specs=devices, out_specs=devices, check_vma=False)
    summed = quick_jit(function)(values)
    assert summed.dtype == jnp.float32
    assert len(set(summed[:, 0].tolist())) == 1
    exact = values[::2].sum()
    assert (summed[0, 0] == exact) == (replica_dtype == "float32")
    assert summed[0, 0] == pytest.approx(exact, abs=4 * 2**-8)
