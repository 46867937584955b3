"""A world that is not the config's: both are named, and the meshes that fit."""

import itertools
from pathlib import Path

import pytest

from launch.job.mesh_fit import check_world, nearest_meshes
from tests import tiny
from tlite_jax.config_files import override
from tlite_jax.errors import UserError


def test_another_world_than_the_configs() -> None:
    config = tiny.config(Path("unused"), "mesh.replica=12", "mesh.fsdp=8", "train.batch_size=768")
    config = override(config, ["execution.num_microbatches=8"])
    check_world(config, 12, 8)
    with pytest.raises(UserError) as refused:
        check_world(config, 2, 8)
    assert str(refused.value) == (
        "mesh: replica 12 x fsdp 8 = 96 devices in the config, 2 x 8 = 16 devices found; with train.batch_size 768 in "
        "8 microbatches these fit, nearest first: mesh.replica=2 mesh.fsdp=8; mesh.replica=1 mesh.fsdp=16; "
        "mesh.replica=4 mesh.fsdp=4; mesh.replica=8 mesh.fsdp=2"
    )
    with pytest.raises(
        UserError, match=r"768 does not divide over 80; use train.batch_size=720 or .*=800, or 64 or 96"
    ):
        check_world(config, 10, 8)
    with pytest.raises(UserError, match=r"mesh.context 2 does not divide 9 devices"):
        check_world(override(config, ["mesh.context=2"]), 9, 1)


@pytest.mark.parametrize(
    ("devices", "context", "microbatches"), [*itertools.product([1, 6, 16, 64, 192], [1, 2], [1, 8])]
)
def test_the_meshes_that_are_named_fit(devices: int, context: int, microbatches: int) -> None:
    words = [f"mesh.context={context}", f"execution.num_microbatches={microbatches}", "train.batch_size=768"]
    config = tiny.config(Path("unused"), "mesh.replica=12", "mesh.fsdp=8", *words)
    meshes = nearest_meshes(config, devices)
    assert bool(meshes) == (devices % context == 0)
    for mesh in meshes:
        changed = override(config, mesh.split())
        check_world(changed, devices, 1)
        groups = devices // context * changed.execution.num_microbatches
        assert 768 % groups == 0
        assert 768 // groups <= max(1, 768 // (devices // context * microbatches))  # no larger a microbatch
