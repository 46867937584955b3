"""The loss of each bucket's tokens: what a step says of rows and what a run logs, against plain numpy."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import QUICK, random_batch, tiny_model
from jax.sharding import NamedSharding

from tests import tiny
from tlite_jax.config import ExecutionConfig, MeshConfig
from tlite_jax.data.order import Plan, PlannedBucket
from tlite_jax.data.segments import Segment, Timeline
from tlite_jax.model import decoder
from tlite_jax.sharding import BATCH_SPEC, make_mesh, num_shards, pad_params
from tlite_jax.telemetry.metrics import read_jsonl
from tlite_jax.train import loop
from tlite_jax.train.bucket_losses import bucket_losses
from tlite_jax.train.state import abstract_state, shardings
from tlite_jax.train.step import make_gradients

MODEL = tiny_model(num_attention_heads=8, num_key_value_heads=4, rope_scaling=None)
ROWS, LENGTH = 24, 16


def timeline_of(*plans: Plan, starts: tuple[int, ...] = (0,)) -> Timeline:
    segments = tuple(Segment(start, plan.hash) for start, plan in zip(starts, plans, strict=True))
    return Timeline(segments, {plan.hash: plan for plan in plans})


def plan_of(**quotas: int) -> Plan:
    buckets = tuple(PlannedBucket(name, {}, 50, quota, f"content of {name}") for name, quota in quotas.items())
    return Plan((buckets,), 3, LENGTH)


def expected_rows(params, batch) -> np.ndarray:
    """[B, 2] from all logits at once, in float64."""
    hidden, head = jax.jit(
        lambda params: nnx.merge(decoder.graphdef(MODEL), params)(batch["tokens"], None), compiler_options=QUICK
    )(params)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    top = logits.max(axis=-1, keepdims=True)
    totals = (top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))[..., 0]
    targets = batch["targets"]
    chosen = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    losses = np.where(targets >= 0, totals - chosen, 0.0)
    return np.stack([losses.sum(axis=1), (targets >= 0).sum(axis=1)], axis=1)


@pytest.mark.parametrize(
    ("replica", "fsdp", "context", "num_microbatches"),
    [(2, 4, 1, 3), (1, 8, 1, 1), (8, 1, 1, 3), (1, 1, 1, 4), (2, 2, 2, 3), (1, 2, 4, 1)],
)
def test_each_rows_loss_lies_at_its_place(replica, fsdp, context, num_microbatches):
    mesh = MeshConfig(replica=replica, fsdp=fsdp, context=context)
    mesh = make_mesh(mesh, jax.devices()[: replica * fsdp * context])
    batch = random_batch(MODEL, rows=ROWS, length=LENGTH)
    batch["targets"][5] = -1  # a row of which nothing is scored
    params = jax.jit(lambda: decoder.init_params(MODEL, 0), compiler_options=QUICK)()
    stored = pad_params(params, decoder.param_specs(MODEL), num_shards(mesh))
    stored = jax.device_put(stored, shardings(abstract_state(MODEL, mesh).params))
    execution = ExecutionConfig(compute_dtype="float32", loss_chunk_tokens=20, num_microbatches=num_microbatches)
    function = jax.jit(make_gradients(MODEL, execution, mesh, False), compiler_options=QUICK)
    _, rows = function(stored, jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC)))
    expected = expected_rows(params, batch)
    assert rows.shape == (ROWS, 2)
    np.testing.assert_array_equal(rows[:, 1], expected[:, 1])
    assert rows[5, 0] == rows[5, 1] == 0
    np.testing.assert_allclose(rows[:, 0], expected[:, 0], rtol=1e-5, atol=0)


def test_rows_are_those_of_the_plan():
    plan = plan_of(ru=30, en=15, rare=1)
    timeline, rows = timeline_of(plan), np.random.default_rng(0).uniform(1, 9, (ROWS, 2))
    rows[3] = 0  # nothing of it is scored
    for first in (0, 7, plan.total_rows - ROWS):
        names = [timeline.buckets[number].name for number in timeline.locate(np.arange(first, first + ROWS))[0]]
        wanted = {}
        for name in sorted(set(names)):
            mine = rows[[other == name for other in names]]
            wanted[f"bucket_loss/{name}"] = mine[:, 0].sum() / mine[:, 1].sum()
        assert bucket_losses(timeline, first, rows) == pytest.approx(wanted, rel=1e-12)


def test_a_bucket_without_scored_tokens_has_no_loss():
    timeline = timeline_of(plan_of(ru=30, en=10))
    is_english = timeline.bucket_numbers(np.arange(ROWS)) == 1
    rows = np.ones((ROWS, 2))
    rows[is_english] = 0
    assert is_english.any()
    assert bucket_losses(timeline, 0, rows) == {"bucket_loss/ru": 1.0}


def test_a_row_that_is_not_finite_spoils_its_own_bucket_only():
    timeline = timeline_of(plan_of(ru=30, en=10))
    rows = np.ones((ROWS, 2), np.float32)
    rows[int(np.flatnonzero(timeline.bucket_numbers(np.arange(ROWS)) == 0)[0]), 0] = np.nan
    found = bucket_losses(timeline, 0, rows)
    assert np.isnan(found["bucket_loss/ru"])
    assert found["bucket_loss/en"] == 1.0


def test_a_bucket_that_a_new_plan_prepares_anew_keeps_its_name():
    old, new = plan_of(ru=20, en=20), plan_of(code=20, ru=20)
    changed = Plan(((PlannedBucket("ru", {}, 60, 20, "other"), *new.buckets[:1]),), 3, LENGTH)
    timeline = timeline_of(old, changed, starts=(0, 20))
    np.testing.assert_array_equal(timeline.bucket_numbers(np.arange(40)), timeline.locate(np.arange(40))[0])
    losses = bucket_losses(timeline, 8, np.ones((24, 2)))
    assert losses == {"bucket_loss/code": 1.0, "bucket_loss/en": 1.0, "bucket_loss/ru": 1.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    tiny.start(config(output))
    return output


def config(output: Path, *words: str):
    return tiny.config(output, *tiny.from_imported(), "telemetry.norms_every=2", "checkpoint.every=3", *words)


def parts(run: Path) -> dict[int, dict[str, float]]:
    """Step -> what is logged of buckets and groups."""
    lines = read_jsonl(run / "metrics.jsonl")
    return {
        line["step"]: {name: value for name, value in line.items() if name.startswith(("bucket_loss/", "group_"))}
        for line in lines
    }


def test_a_run_logs_them(whole):
    lines = {line["step"]: line for line in read_jsonl(whole / "metrics.jsonl")}
    for step, found in parts(whole).items():
        losses = [value for name, value in found.items() if name.startswith("bucket_loss/")]
        assert len(losses) == 2
        # 18 rows of Russian and 6 of English, of which a few tokens are not scored.
        assert min(losses) < lines[step]["loss"] < max(losses)
        assert len(found) - 2 == (3 * 6 if step % 2 == 0 else 0)


def test_an_interrupted_run_logs_the_same(whole, tmp_path, monkeypatch):
    run, batches = tmp_path / "run", loop.batches

    def cut(*arguments, **options):
        for number, batch in enumerate(batches(*arguments, **options), start=1):
            if number == 5:
                raise InterruptedError
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", cut)
        with pytest.raises(InterruptedError):
            tiny.start(config(run))
    tiny.start(config(run, "telemetry.norms_every=3"))
    expected, found = parts(whole), parts(run)
    assert found.keys() == expected.keys() == set(range(1, 7))
    for step, values in expected.items():
        shown = step % 2 == 0 if step <= 3 else step % 3 == 0
        for name, value in values.items():
            assert name in found[step] or (name.startswith("group_") and not shown)
            assert found[step].get(name, value) == value
        assert any(name.startswith("group_") for name in found[step]) == shown


def test_norms_are_logged_between_logged_steps_and_can_be_left_out(tmp_path):
    tiny.start(config(tmp_path / "a", "train.log_every=3", "telemetry.norms_every=2"))
    logged = parts(tmp_path / "a")
    assert list(logged) == [2, 3, 4, 6]
    assert [step for step, values in logged.items() if "group_update_norm/embedding" in values] == [2, 4, 6]
    tiny.start(config(tmp_path / "b", "telemetry.norms_every=0"))
    assert not any(name.startswith("group_") for values in parts(tmp_path / "b").values() for name in values)
