"""Batches: the plan's rows in the plan's order, on any number of hosts, from any position."""

from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_buckets import write_store

from tlite_jax.config import MixtureConfig, MixtureGroup
from tlite_jax.data.buckets import BucketStore
from tlite_jax.data.loader import BatchSource, RowSource, batches, local_rows
from tlite_jax.data.mixture import Plan, make_plan
from tlite_jax.errors import UserError

B, T = 24, 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> BucketStore:
    rng = np.random.default_rng(0)
    lengths = {name: rng.integers(1, 50, count).tolist() for name, count in (("ru", 90), ("en", 20), ("code", 7))}
    return BucketStore.open(write_store(tmp_path_factory.mktemp("loader") / "s", lengths, sequence_length=T))


@pytest.fixture(scope="module")
def plan(store: BucketStore) -> Plan:
    russian = MixtureGroup(select={"language": "ru"}, share=0.8)
    mixture = MixtureConfig(groups=(russian, MixtureGroup(select={}, share=0.2)))
    return make_plan(mixture, store.infos(), seed=3, sequence_length=T, rows=10 * B + 5)


def sharding(replica: int, fsdp: int) -> jax.sharding.NamedSharding:
    mesh = jax.make_mesh((replica, fsdp), ("replica", "fsdp"), devices=jax.devices()[: replica * fsdp])
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("replica", "fsdp")))


def take(store: BucketStore, plan: Plan, count: int, *, mesh=(1, 1), start_row: int = 0, masking: bool = False):
    stream = batches(plan, store, sharding=sharding(*mesh), batch_size=B, start_row=start_row, document_masking=masking)
    return [{name: np.asarray(values) for name, values in next(stream).items()} for _ in range(count)]


def test_batches_are_the_plans_rows(store: BucketStore, plan: Plan) -> None:
    found = take(store, plan, 10, masking=True)
    for number, batch in enumerate(found):
        bucket, _, row = plan.locate(np.arange(number * B, (number + 1) * B))
        for i in range(B):
            source = store.buckets[plan.buckets[bucket[i]].name]
            real = source.num_tokens(row[i])
            tokens = source.read_row(row[i]).astype(np.int32)
            assert np.array_equal(batch["tokens"][i], tokens)
            assert np.array_equal(batch["targets"][i, : real - 1], tokens[1:real])
            assert np.all(batch["targets"][i, real - 1 :] == -1)
            assert np.array_equal(batch["segment_ids"][i], source.segment_ids(row[i]))
            assert np.array_equal(batch["segment_ids"][i] == 0, np.arange(T) >= real)
    assert any(np.any(batch["segment_ids"] == 0) for batch in found), "no padded row in this test"
    assert all(values.dtype == np.int32 and values.shape == (B, T) for values in found[0].values())
    assert set(take(store, plan, 1)[0]) == {"tokens", "targets"}


@pytest.mark.parametrize("mesh", [(1, 8), (8, 1), (2, 4), (4, 2), (1, 3), (3, 2)])
def test_every_mesh_gives_the_same_batches(mesh: tuple[int, int], store: BucketStore, plan: Plan) -> None:
    for one, many in zip(take(store, plan, 3), take(store, plan, 3, mesh=mesh), strict=True):
        assert np.array_equal(one["tokens"], many["tokens"])
        assert np.array_equal(one["targets"], many["targets"])


@given(hosts=st.sampled_from([1, 2, 3, 4, 8]), start=st.integers(0, 5 * B), seed=st.integers(0, 1000))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hosts_together_read_the_global_order(store, plan, hosts: int, start: int, seed: int) -> None:
    rows = RowSource(plan, store, document_masking=False)
    # Which host holds which rows is the mesh's business: contiguous or not, each row is held by one.
    order = np.random.default_rng(seed).permutation(B) if seed % 2 else np.arange(B)
    parts = [np.sort(part) for part in np.split(order, hosts)]
    sources = [BatchSource(rows, start_row=start, batch_size=B, offsets=part) for part in parts]
    whole = rows.read(np.arange(start, start + B * len(sources[0])))
    for number in range(len(sources[0])):
        together = np.empty((B, T), np.int32)
        for part, source in zip(parts, sources, strict=True):
            together[part] = source[number]["tokens"]
        assert np.array_equal(together, whole["tokens"][number * B : (number + 1) * B])


def test_a_process_reads_the_rows_of_its_devices() -> None:
    assert local_rows(sharding(2, 4), (B, T)).tolist() == list(range(B))
    assert local_rows(sharding(1, 3), (B, T)).tolist() == list(range(B))
    mesh = jax.make_mesh((2, 2), ("replica", "fsdp"), devices=jax.devices()[:4])
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    assert local_rows(replicated, (B, T)).tolist() == list(range(B))


@pytest.mark.parametrize("done", [1, 4, 9])
def test_resuming_equals_going_on(done: int, store: BucketStore, plan: Plan) -> None:
    whole = take(store, plan, 10)
    rest = take(store, plan, 10 - done, start_row=done * B, mesh=(2, 2))
    for expected, found in zip(whole[done:], rest, strict=True):
        assert np.array_equal(expected["tokens"], found["tokens"])


def test_past_the_end_is_refused(store: BucketStore, plan: Plan) -> None:
    with pytest.raises(UserError, match=r"has 245 rows: no whole batch of 24 is left after row 240"):
        take(store, plan, 11)
    with pytest.raises(UserError, match="has 245 rows"):
        take(store, plan, 1, start_row=1000)


def test_what_does_not_fit_is_refused(store: BucketStore, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch size 24 does not divide over the 5 devices"):
        take(store, plan, 1, mesh=(1, 5))
    other = BucketStore.open(write_store(tmp_path / "other", {"en": [50], "ru": [50]}, sequence_length=T))
    with pytest.raises(UserError, match=r"bucket code is not in|has changed since"):
        take(other, plan, 1)
    smaller = BucketStore.open(
        write_store(tmp_path / "smaller", {name: [50] for name in ("ru", "en", "code")}, sequence_length=T)
    )
    with pytest.raises(UserError, match="has changed since the mixture was planned"):
        take(smaller, plan, 1)


def test_damage_met_while_training_names_the_row(tmp_path: Path) -> None:
    directory = write_store(tmp_path / "s", {"ru": [100]}, sequence_length=T)
    opened = BucketStore.open(directory)
    order = make_plan(MixtureConfig(), opened.infos(), seed=0, sequence_length=T, rows=None)
    path = directory / "ru" / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))
    stream = batches(order, opened, sharding=sharding(1, 1), batch_size=7, start_row=0, document_masking=False)
    with pytest.raises(UserError, match=r"bucket ru: row 0 of .* is damaged"):
        next(stream)
