"""Training on packed rows is training on each document alone, its prompt read and not scored."""

from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import max_difference, quick_jit, tiny_model

from tests.train.test_gradients import gradients_of, random_params
from tlite_jax.config import MixtureConfig
from tlite_jax.data.bucket_writer import BucketWriter
from tlite_jax.data.buckets import BucketStore
from tlite_jax.data.files import write_json
from tlite_jax.data.loader import BatchSource, RowSource
from tlite_jax.data.mixture import make_plan
from tlite_jax.data.packed_rows import write_packed
from tlite_jax.data.row_format import FORMAT_VERSION, UNSCORED
from tlite_jax.errors import UserError
from tlite_jax.loss import cross_entropy_and_gradients

T, MODEL = 32, tiny_model()
LENGTHS = [5, 31, 12, 12, 7, 32, 3, 20, 9, 2, 16, 11]


def documents() -> list[np.ndarray]:
    """Prompts and answers of random tokens; a prompt's tokens have the UNSCORED bit."""
    rng = np.random.default_rng(0)
    result = []
    for length in LENGTHS:
        tokens = rng.integers(0, MODEL.vocab_size, length).astype(np.uint32)
        tokens[: int(rng.integers(0, length))] |= UNSCORED
        result.append(tokens)
    return result


def open_store(directory: Path, packing: str) -> BucketStore:
    directory.mkdir()
    with BucketWriter(directory, "chat", sequence_length=T, pad_id=3, packing=packing) as writer:
        if packing == "best_fit":
            write_packed(writer, np.array(LENGTHS), lambda number: documents()[number], text_bytes=0)
        else:
            writer.append(np.concatenate(documents()), np.array(LENGTHS), 0)
        digest = writer.close({}, never_trained=False)
    manifest = {"format_version": FORMAT_VERSION, "sequence_length": T, "buckets": {"chat": digest}}
    write_json(directory / "manifest.json", manifest)
    return BucketStore.open(directory)


def rows_of(store: BucketStore, document_masking) -> dict[str, np.ndarray]:
    plan = make_plan(MixtureConfig(), store.infos(), seed=0, sequence_length=T, rows=None)
    return RowSource(plan, store, document_masking=document_masking).read(np.arange(plan.total_rows))


def alone() -> dict[str, np.ndarray]:
    """Each document in a row of its own, by a plain restatement."""
    batch = {name: np.full((len(LENGTHS), T), fill, np.int32) for name, fill in (("tokens", 3), ("targets", -1))}
    batch["segment_ids"] = np.zeros((len(LENGTHS), T), np.int32)
    for row, document in enumerate(documents()):
        ids, scored = document & ~UNSCORED, document < UNSCORED
        batch["tokens"][row, : len(ids)] = ids
        batch["segment_ids"][row, : len(ids)] = 1
        for position in range(len(ids) - 1):
            if scored[position + 1]:
                batch["targets"][row, position] = ids[position + 1]
    return batch


@pytest.mark.parametrize("document_masking", [True, "best_fit"])
def test_loss_and_gradients_equal_those_of_documents_alone(tmp_path: Path, document_masking) -> None:
    packed = rows_of(open_store(tmp_path / "s", "best_fit"), document_masking)
    assert len(packed["tokens"]) == 6, "twelve documents of 160 tokens in rows of 32"
    params = random_params(MODEL)
    gradients, loss, count = gradients_of(MODEL, params, packed)
    expected_gradients, expected_loss, expected_count = gradients_of(MODEL, params, alone())
    assert count == expected_count == np.sum(packed["targets"] >= 0)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert max_difference(gradients, expected_gradients) < 2e-5


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_packed_rows_are_the_same_on_any_number_of_hosts(tmp_path: Path, hosts: int) -> None:
    store = open_store(tmp_path / "s", "best_fit")
    plan = make_plan(MixtureConfig(), store.infos(), seed=0, sequence_length=T, rows=None)
    rows = RowSource(plan, store, document_masking="best_fit")
    whole = BatchSource(rows, start_row=0, batch_size=6, offsets=np.arange(6))[0]
    parts = [BatchSource(rows, start_row=0, batch_size=6, offsets=part)[0] for part in np.split(np.arange(6), hosts)]
    for name, values in whole.items():
        assert np.array_equal(values, np.concatenate([part[name] for part in parts])), name


def test_masked_tokens_have_no_gradient(tmp_path: Path) -> None:
    packed = rows_of(open_store(tmp_path / "s", "best_fit"), True)
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(*packed["tokens"].shape, 8)).astype("f4")
    head = rng.normal(size=(MODEL.vocab_size, 8)).astype("f4")
    function = quick_jit(lambda *arrays: cross_entropy_and_gradients(*arrays, chunk_tokens=32))
    losses, (gradient, _) = jax.tree.map(np.asarray, function(hidden, head, packed["targets"]))
    is_scored = np.any(gradient != 0, axis=-1)
    assert np.array_equal(is_scored, packed["targets"] >= 0)
    assert np.array_equal(is_scored, losses > 0)
    assert 0 < np.sum(is_scored) < packed["tokens"].size


def test_concatenated_rows_keep_their_mask_and_one_segment(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", "concatenate")
    rows = rows_of(store, False)
    stream = np.concatenate(documents())
    plan = make_plan(MixtureConfig(), store.infos(), seed=0, sequence_length=T, rows=None)
    _, _, places = plan.locate(np.arange(plan.total_rows))
    for row, place in enumerate(places.tolist()):
        raw = stream[place * T : (place + 1) * T]
        expected = np.where(raw < UNSCORED, raw.astype(np.int64), -1)
        assert np.array_equal(rows["targets"][row, : len(raw) - 1], expected[1:])
    assert np.all(rows_of(store, "best_fit")["segment_ids"] <= 1)
    assert rows_of(store, True)["segment_ids"].max() > 1


def test_packed_rows_without_document_masks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bucket chat was packed best_fit.*set data\.document_masking to best_fit"):
        rows_of(open_store(tmp_path / "s", "best_fit"), False)
