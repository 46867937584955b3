"""Devices that compute or hold something else: found at the step, named, written down, and nothing of it saved."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch import __main__ as commands
from tests import tiny
from tlite_jax.checkpoint import find, steps_on_disk
from tlite_jax.errors import CorruptionError, UserError
from tlite_jax.sharding import FSDP
from tlite_jax.train import loop
from tlite_jax.train.corruption import _to_devices, _to_host
from tlite_jax.train.digest import Digester
from tlite_jax.train.directory import ANOMALIES_FILE
from tlite_jax.train.run import open_run


def flip(array: jax.Array, device: int, element: int = 0, bit: int = 0) -> jax.Array:
    """The array with one bit of one device's shard flipped."""
    parts = []
    for shard in array.addressable_shards:
        part = np.array(shard.data)
        if shard.device.id == device:
            part.reshape(-1).view(np.uint32)[element] ^= np.uint32(1 << bit)
        parts.append(jax.device_put(part, shard.device, may_alias=False))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def swap(array: jax.Array, device: int) -> jax.Array:
    """The array with two neighbours of one device's shard exchanged."""
    parts = []
    for shard in array.addressable_shards:
        part = np.array(shard.data)
        if shard.device.id == device:
            part.reshape(-1)[[0, 1]] = part.reshape(-1)[[1, 0]]
        parts.append(jax.device_put(part, shard.device, may_alias=False))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def state_on(mesh: jax.sharding.Mesh) -> dict:
    rng = np.random.default_rng(0)
    shapes = {"scalar": ((), PartitionSpec()), "norm": ((8,), PartitionSpec(FSDP))}
    shapes |= {"matrix": ((6, 16), PartitionSpec(None, (FSDP, "context")))}
    return {
        name: jax.device_put(jnp.asarray(rng.standard_normal(shape), jnp.float32), NamedSharding(mesh, spec))
        for name, (shape, spec) in shapes.items()
    }


@pytest.mark.parametrize("harm", [flip, swap, lambda array, device: flip(array, device, element=-1, bit=31)])
@pytest.mark.parametrize("name", ["norm", "matrix"])
def test_the_device_that_holds_something_else_is_named(harm, name: str) -> None:
    mesh = tiny.mesh(4, 2)
    state = state_on(mesh)
    digester = Digester(mesh, state)
    assert digester.among_replicas(digester(state)) == []
    before = digester(state)
    state[name] = harm(state[name], 5)
    (found,) = digester.among_replicas(digester(state))
    assert (found.array, [device.id for device in found.devices], found.sure) == (name, [5], True)
    (found,) = digester.between(before, digester(state))
    assert (found.array, [device.id for device in found.devices]) == (name, [5])
    assert (before != digester(state)).sum() == 2  # both sums see it


def test_of_two_replicas_either_may_be_wrong() -> None:
    mesh = tiny.mesh(2, 4)
    state = state_on(mesh)
    digester = Digester(mesh, state)
    (found,) = digester.among_replicas(digester({**state, "matrix": flip(state["matrix"], 6)}))
    assert ([device.id for device in found.devices], found.sure) == ([2, 6], False)
    # What is whole on every device has eight copies.
    (found,) = digester.among_replicas(digester({**state, "scalar": flip(state["scalar"], 6)}))
    assert (found.array, [device.id for device in found.devices], found.sure) == ("scalar", [6], True)
    two = digester({**state, "matrix": flip(flip(state["matrix"], 0), 5)})
    (found,) = digester.among_replicas(two)
    assert ([device.id for device in found.devices], found.sure) == ([0, 4, 1, 5], False)


def test_every_flipped_bit_changes_the_digest() -> None:
    mesh = tiny.mesh(1, 1)
    array = jax.device_put(np.zeros((3, 5), np.float32), NamedSharding(mesh, PartitionSpec()))
    digester = Digester(mesh, {"a": array})
    seen = {digester({"a": array}).tobytes()}
    for element in range(15):
        for bit in range(0, 32, 3):
            seen.add(digester({"a": flip(array, 0, element, bit)}).tobytes())
    assert len(seen) == 1 + 15 * 11


def test_a_copy_in_host_memory_comes_back_bit_for_bit_and_is_no_view() -> None:
    mesh = tiny.mesh(4, 2)
    state = state_on(mesh)
    state["matrix"] = flip(state["matrix"], 5)  # of a corrupt state too
    digester = Digester(mesh, state)
    before, copy = digester(state), _to_host(state)
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    spoil(state)
    back = _to_devices(copy)
    assert (digester(back) == before).all()
    assert all(back[name].sharding == NamedSharding(mesh, back[name].sharding.spec) for name in back)
    spoil(back)
    assert (digester(_to_devices(copy)) == before).all()


def start(
    output: Path, monkeypatch: pytest.MonkeyPatch, *words: str, wrong_call: int | None = None, replica: int = 2
) -> loop.Result:
    """A run of 6 steps on replica x 2 devices; one call of the step, counted from 1, flips a bit of what it returns."""
    calls = 0

    def make_step(*arguments, **options):
        step_fn = tiny.make_quick_step(*arguments, **options)

        def step(state, batch):
            nonlocal calls
            calls += 1
            state, metrics = step_fn(state, batch)
            if calls == wrong_call:
                state = state._replace(params={**state.params, "final_norm": flip(state.params["final_norm"], 3)})
            return state, metrics

        return step

    asked = tiny.config(output, *tiny.from_imported(), f"mesh.replica={replica}", "checkpoint.every=1", *words)
    mesh = tiny.mesh(replica, 2)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_step", make_step)
        result = loop.train(open_run(asked, mesh=mesh), mesh)
    start.calls = calls
    return result


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / ANOMALIES_FILE).read_text(encoding="utf-8").splitlines()]


def test_checked_steps_are_the_usual_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path / "whole", monkeypatch)
    assert start.calls == 6
    start(tmp_path / "run", monkeypatch, "train.verify_every=2", "train.compare_replicas_every=1")
    assert start.calls == 9
    assert tiny.metrics(tmp_path / "run") == tiny.metrics(tmp_path / "whole")
    tiny.assert_same_state(find(tmp_path / "run"), find(tmp_path / "whole"))
    assert not (tmp_path / "run" / ANOMALIES_FILE).exists()


@pytest.mark.parametrize("wrong_call", [4, 5])
def test_a_step_that_computes_two_things_ends_the_run(
    wrong_call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, words = tmp_path / "run", ["train.verify_every=2"]
    message = (
        r"step 4: the same step on the same state gave different bits: params\.final_norm, on .*3.* \(process 0\);"
    )
    with pytest.raises(CorruptionError, match=message):
        # Steps 1, 2 twice, 3, 4 twice.
        start(output, monkeypatch, *words, wrong_call=wrong_call + 1)
    assert steps_on_disk(output) == [1, 2, 3]
    (line,) = lines(output)
    assert (line["step"], line["kind"], line["right_at"], len(line["rows"])) == (4, "computed_twice", 2, 24)
    assert [found["array"] for found in line["arrays"]] == ["params.final_norm"]
    assert "3" in line["arrays"][0]["devices"][0]
    # Gone on with on devices that are right, it ends as it should; what was found stays on record.
    start(output, monkeypatch, *words)
    start(tmp_path / "whole", monkeypatch)
    tiny.assert_same_state(find(output), find(tmp_path / "whole"))
    assert [found["step"] for found in lines(output)] == [4]


def test_replicas_that_differ_end_the_run_before_they_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with pytest.raises(
        CorruptionError, match=r"step 3: replicas hold different bits: params\.final_norm.*one of these"
    ):
        start(output, monkeypatch, "train.compare_replicas_every=1", wrong_call=3)
    assert steps_on_disk(output) == [1, 2]
    (line,) = lines(output)
    assert (line["kind"], line["right_at"], line["arrays"][0]["sure"]) == ("replicas", 2, False)


def test_replicas_that_differed_before_are_found_by_a_verified_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both times the step starts from the same wrong state: only the replicas tell."""
    with pytest.raises(CorruptionError, match=r"step 4: replicas hold different bits: .*params\.final_norm"):
        start(tmp_path / "run", monkeypatch, "train.verify_every=4", wrong_call=2, replica=4)
    assert steps_on_disk(tmp_path / "run") == [1, 2, 3]
    assert [found["right_at"] for found in lines(tmp_path / "run")] == [0]


def test_what_cannot_be_compared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="needs two replicas"):
        start(tmp_path / "run", monkeypatch, "train.compare_replicas_every=1", replica=1)


def test_the_command_ends_with_its_own_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fails() -> None:
        raise CorruptionError("step 3: replicas hold different bits")

    monkeypatch.setattr(commands, "build_app", lambda: fails)
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 78
    assert capsys.readouterr().err == "error: step 3: replicas hold different bits\n"
