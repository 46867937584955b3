"""Windows and rows: each text token once, little padding, the same bytes under every tokenizer."""

import math

import jax
import numpy as np
import pytest
from helpers import tiny_model

from tlite_jax.config import ExecutionConfig, MeshConfig
from tlite_jax.data.buckets import HeldOutBucket, HeldOutDocument
from tlite_jax.evaluate.bits_per_byte import Evaluator, NotFiniteError, make_sample
from tlite_jax.evaluate.rows import Boundaries, Packing, Window, choose
from tlite_jax.loss import IGNORED
from tlite_jax.model import decoder
from tlite_jax.sharding import make_mesh

MODEL = tiny_model(vocab_size=300)
EXECUTION = ExecutionConfig(compute_dtype="float32")
START = 299


def windows(sizes, length=32):
    rng = np.random.default_rng(0)
    result = []
    for number, size in enumerate(sizes):
        tokens = rng.integers(0, 100, size + 1).astype(np.int32)
        result.append(Window(number, tokens[:-1], tokens[1:]))
    return result


def test_every_window_is_in_one_row_whole_and_behind_a_mask():
    given = windows([5, 32, 1, 17, 15, 15, 32, 30, 2])
    packing = Packing(given, 32)
    batch = packing.batch(0, len(packing))
    assert (np.bincount(batch.owner[batch.owner >= 0]) == [len(window.inputs) for window in given]).all()
    for number, window in enumerate(given):
        (row,) = set(np.nonzero(batch.owner == number)[0])
        here = batch.owner[row] == number
        assert (batch.tokens[row][here] == window.inputs).all()
        assert (batch.targets[row][here] == window.targets).all()
        (segment,) = set(batch.segment_ids[row][here])
        assert (here == (batch.segment_ids[row] == segment)).all()
    assert ((batch.targets == IGNORED) == (batch.owner < 0)).all()
    assert packing.num_scored == sum(len(window.inputs) for window in given)


def test_batches_cut_the_same_rows_and_end_in_empty_ones():
    packing = Packing(windows([20, 20, 20, 20, 20]), 32)
    whole, parts = packing.batch(0, 5), [packing.batch(first, 2) for first in (0, 2, 4)]
    for name in whole._fields:
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined[:5], getattr(whole, name))
    assert (parts[2].targets[1] == IGNORED).all()


def test_many_short_documents_leave_little_padding():
    sizes = np.minimum(np.random.default_rng(1).lognormal(5, 1, 20_000).astype(int) + 1, 2048)
    packing = Packing(windows(sizes), 2048)
    assert sizes.sum() / (len(packing) * 2048) > 0.999
    assert max(sum(sizes[number] for number in row) for row in packing.rows) <= 2048


TEXTS = [
    "Чтобы сохранить документ, нажмите кнопку.",
    "To save the document, press the button.",
    "x = y",
    "длинный " * 30,
]


def bucket_of(tokenize) -> HeldOutBucket:
    documents = [HeldOutDocument(np.array([START, *tokenize(text)], np.uint32), len(text.encode())) for text in TEXTS]
    return HeldOutBucket("all", {}, False, documents)


def by_byte(text: str) -> list[int]:
    return list(text.encode())


def by_pair(text: str) -> list[int]:
    return [sum(pair) % 298 for pair in zip(text.encode()[::2], [*text.encode()[1::2], 0], strict=False)]


@pytest.mark.parametrize("tokenize", [by_byte, by_pair])
def test_a_model_that_knows_nothing_scores_as_it_must_under_every_tokenizer(tokenize):
    """All logits are 0: log2 V bits a token, whatever the windows, and the bytes are the text's."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    evaluator = Evaluator(MODEL, EXECUTION, mesh, sequence_length=32, batch_size=4, start=START, end=None)
    nothing = jax.tree.map(np.zeros_like, decoder.init_params(MODEL, 0))
    score = evaluator.score(nothing, [bucket_of(tokenize)])["all"]
    num_tokens = sum(len(tokenize(text)) for text in TEXTS)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (score.num_tokens, score.num_bytes) == (num_tokens, num_bytes)
    assert score.bits_per_byte == pytest.approx(num_tokens * math.log2(300) / num_bytes, rel=1e-6)


def test_a_budget_in_bytes_chooses_the_same_documents_for_every_tokenizer():
    for budget in (1, 50, 120, 1000):
        chosen = [choose(bucket_of(tokenize), None, budget) for tokenize in (by_byte, by_pair)]
        first, second = ([document.num_bytes for document in documents] for documents in chosen)
        assert first == second
        assert sum(first) <= budget or first == [5]
    assert [d.num_bytes for d in choose(bucket_of(by_byte), 100, None)] != [
        d.num_bytes for d in choose(bucket_of(by_pair), 100, None)
    ]


@pytest.mark.parametrize("start", [START, None])
def test_tokens_that_are_not_scored_are_context(start):
    tokens = np.array([*([] if start is None else [start]), 5, 6, 7, 8, 2], np.uint32)
    scored = np.isin(tokens, [7, 8, 2])
    (window,) = Boundaries(start, 2).text_windows(0, HeldOutDocument(tokens, 9, scored), 32)
    assert window.inputs.tolist() == [2 if start is None else start, 5, 6, 7]
    assert window.targets.tolist() == [IGNORED, IGNORED, 7, 8]


def test_documents_without_text_have_no_windows():
    assert Boundaries(None, 2).text_windows(0, HeldOutDocument(np.array([2], np.uint32), 0), 8) == []
    assert Boundaries(1, None).text_windows(0, HeldOutDocument(np.array([1], np.uint32), 0), 8) == []


def test_padding_is_counted():
    mesh = make_mesh(MeshConfig(fsdp=8), jax.devices())
    evaluator = Evaluator(MODEL, EXECUTION, mesh, sequence_length=32, batch_size=1, start=START, end=None)
    sample = make_sample([bucket_of(by_byte)], Boundaries(START, None), 32)
    assert evaluator.num_positions(sample) == -(-len(sample.packing) // 8) * 8 * 32
    assert evaluator.padding_share(sample) == 1 - sum(len(text.encode()) for text in TEXTS) / (
        evaluator.num_positions(sample)
    )


def test_what_is_not_finite_names_the_bucket():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    evaluator = Evaluator(MODEL, EXECUTION, mesh, sequence_length=32, batch_size=4, start=START, end=None)
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), decoder.init_params(MODEL, 0))
    with pytest.raises(NotFiniteError, match="the loss on held-out bucket all is nan"):
        evaluator.score(broken, [bucket_of(by_byte)])


def test_of_a_chat_only_the_answers_are_scored() -> None:
    scored = np.array([False, False, False, True, True, False, True, True])
    document = HeldOutDocument(np.array([1, 5, 6, 7, 8, 9, 10, 2], np.uint32), 4, scored)
    (window,) = Boundaries(1, 2).text_windows(0, document, 16)
    assert window.inputs.tolist() == [1, 5, 6, 7, 8, 9]
    assert window.targets.tolist() == [IGNORED, IGNORED, 7, 8, IGNORED, 10]
    (window,) = Boundaries(None, 2).text_windows(0, document, 16)
    assert window.inputs.tolist() == [2, 1, 5, 6, 7, 8, 9]
    assert window.targets.tolist() == [IGNORED, IGNORED, IGNORED, 7, 8, IGNORED, 10]
