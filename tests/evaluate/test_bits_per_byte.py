import math

import jax
import numpy as np
import pytest
import torch
from helpers import ROPE_SCALING, hf_model, params_from_hf, tiny_model

from tlite_jax.config import ExecutionConfig, MeshConfig
from tlite_jax.data.buckets import HeldOutBucket, HeldOutDocument
from tlite_jax.evaluate.bits_per_byte import Evaluator, Score, by_name, combine
from tlite_jax.model import decoder
from tlite_jax.sharding import make_mesh, pad_params
from tlite_jax.train.state import abstract_state, shardings

MODEL = tiny_model(head_dim=16, rope_scaling=ROPE_SCALING, num_key_value_heads=1)
LENGTH = 16
START, END = 1, 2
EXECUTION = ExecutionConfig(compute_dtype="float32", loss_chunk_tokens=24)
# Without boundary marks: shorter than a window, as long, a token more, several windows, a single token.
LENGTHS = {"short": [3, 15, 7, 1, 9], "long": [16, 17, 32, 33, 75, 2], "elsewhere": [20]}


def documents(lengths, seed, *, start=START, end=END):
    rng = np.random.default_rng(seed)
    for number, length in enumerate(lengths):
        text = rng.integers(3, MODEL.vocab_size, length)
        tokens = [*([] if start is None else [start]), *text, *([] if end is None else [end])]
        yield HeldOutDocument(np.array(tokens, np.uint32), num_bytes=4 * length + number)


def make_buckets(**boundaries):
    return [
        HeldOutBucket(
            name,
            {"language": "ru" if name == "long" else "en", "topic": name},
            never_trained=name == "elsewhere",
            documents=list(documents(lengths, seed, **boundaries)),
        )
        for seed, (name, lengths) in enumerate(LENGTHS.items())
    ]


@pytest.fixture(scope="module")
def reference():
    return hf_model(MODEL)


def evaluate(reference, buckets, *, mesh_shape=(1, 1), start=START, end=END, max_tokens=None, **options):
    replica, fsdp, context = (*mesh_shape, 1)[:3]
    mesh = make_mesh(MeshConfig(replica=replica, fsdp=fsdp, context=context), jax.devices()[: math.prod(mesh_shape)])
    stored = pad_params(params_from_hf(reference, MODEL), decoder.param_specs(MODEL), fsdp * context)
    params = jax.device_put(stored, shardings(abstract_state(MODEL, mesh).params))
    settings = {"sequence_length": LENGTH, "batch_size": 3, **options}
    evaluator = Evaluator(MODEL, EXECUTION, mesh, start=start, end=end, **settings)
    return evaluator.score(params, buckets, max_tokens)


def direct_nats(reference, tokens, start, end):
    """Windows of one document, a window at a time, in float64: each text token once, given its window so far."""
    text = [int(token) for token in tokens if token not in (start, end)]
    context = start if start is not None else end
    model = reference.double()
    total = 0.0
    for first in range(0, len(text), LENGTH):
        window = text[first : first + LENGTH]
        inputs = [context if first == 0 else text[first - 1], *window[:-1]]
        with torch.no_grad():
            logits = model(torch.tensor([inputs])).logits[0]
        total -= torch.log_softmax(logits, -1)[range(len(window)), window].sum().item()
    reference.float()
    return total


@pytest.mark.parametrize(("start", "end"), [(START, END), (None, END), (START, None)])
def test_scores_equal_transformers_document_by_document(reference, start, end):
    buckets = make_buckets(start=start, end=end)
    scores = evaluate(reference, buckets, start=start, end=end)
    for bucket in buckets:
        expected = sum(direct_nats(reference, document.tokens, start, end) for document in bucket.documents)
        score = scores[bucket.name]
        assert score.nats == pytest.approx(expected, rel=1e-6)
        assert score.num_tokens == sum(LENGTHS[bucket.name])
        assert score.num_bytes == sum(document.num_bytes for document in bucket.documents)
        assert score.bits_per_byte == pytest.approx(expected / math.log(2) / score.num_bytes, rel=1e-6)


@pytest.fixture(scope="module")
def scores(reference):
    return evaluate(reference, make_buckets())


@pytest.mark.parametrize(("mesh_shape", "batch_size"), [((2, 4), 3), ((1, 4, 2), 9)])
def test_a_mesh_scores_as_one_device(reference, scores, mesh_shape, batch_size):
    sharded = evaluate(reference, make_buckets(), mesh_shape=mesh_shape, batch_size=batch_size)
    assert sharded.keys() == scores.keys()
    for name, score in sharded.items():
        assert score.nats == pytest.approx(scores[name].nats, rel=1e-6)
        assert (score.num_bytes, score.num_tokens) == (scores[name].num_bytes, scores[name].num_tokens)


def test_a_documents_company_does_not_change_its_score(reference, scores):
    """Each document as a bucket of its own, so in rows of its own, and the buckets in another order."""
    buckets = make_buckets()
    alone = [
        HeldOutBucket(f"{bucket.name}-{number}", {}, False, [document])
        for bucket in reversed(buckets)
        for number, document in enumerate(bucket.documents)
    ]
    separate = evaluate(reference, alone)
    for name, score in scores.items():
        nats = sum(part.nats for key, part in separate.items() if key.startswith(name + "-"))
        assert score.nats == pytest.approx(nats, rel=1e-6)


def test_max_tokens_takes_whole_documents(reference, scores):
    buckets = make_buckets()
    sizes = [len(document.tokens) for document in buckets[0].documents]
    assert sizes[0] + sizes[2] < sizes[0] + sizes[1]
    # Room for the first and the third; the second is passed over.
    limited = evaluate(reference, buckets, max_tokens=sizes[0] + sizes[2])
    chosen = [buckets[0].documents[0], buckets[0].documents[2]]
    expected = sum(direct_nats(reference, document.tokens, START, END) for document in chosen)
    assert limited["short"].nats == pytest.approx(expected, rel=1e-6)
    assert limited["short"].num_bytes == sum(document.num_bytes for document in chosen)
    # Where none fits, the shortest is scored all the same.
    least = evaluate(reference, buckets, max_tokens=1)
    assert least["short"].num_bytes == min(buckets[0].documents, key=lambda d: len(d.tokens)).num_bytes


def test_progress_counts_rows(reference):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    evaluator = Evaluator(MODEL, EXECUTION, mesh, sequence_length=LENGTH, batch_size=3, start=START, end=END)
    seen = []
    evaluator.score(
        params_from_hf(reference, MODEL), make_buckets()[2:], progress=lambda done, total: seen.append((done, total))
    )
    # 20 scored tokens, a window of 16 and one of 4, which share no row.
    assert seen == [(2, 2)]


def test_combining_adds_up_what_was_trained_on():
    scores = {"short": Score(10.0, 5, 3), "long": Score(20.0, 6, 4), "elsewhere": Score(40.0, 7, 5)}
    buckets = make_buckets()
    assert combine(scores, buckets, "language") == {"en": scores["short"], "ru": scores["long"]}
    assert combine(scores, buckets, "style") == {}
    trained = [HeldOutBucket(b.name, b.labels, False, b.documents) for b in buckets]
    assert combine(scores, trained, "language")["en"] == Score(50.0, 12, 8)
    assert by_name(scores, buckets) == {**scores, "language=en": scores["short"], "language=ru": scores["long"]}


def test_no_buckets_have_no_scores(reference):
    assert evaluate(reference, []) == {}
