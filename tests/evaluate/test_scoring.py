"""Log-likelihoods of packed rows against transformers on each request alone."""

import jax
import numpy as np
import pytest
import torch
from helpers import ROPE_SCALING, hf_model, params_from_hf, tiny_model

from tlite_jax.config import MeshConfig
from tlite_jax.errors import UserError
from tlite_jax.evaluate.packing import Scoring, pack, row_length
from tlite_jax.evaluate.scoring import NonFiniteError, Scorer
from tlite_jax.model.decoder import param_specs
from tlite_jax.sharding import make_mesh, num_shards, pad_params

CONFIG = tiny_model(head_dim=16, rope_scaling=ROPE_SCALING, max_position_embeddings=40, vocab_size=131)


def requests(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Multiple-choice questions, half behind one prompt; lone sentences; a repeat; and some that are too long."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> list[int]:
        return rng.integers(0, CONFIG.vocab_size, rng.integers(low, high)).tolist()

    prompt, result = tokens(12, 13), []
    for number in range(8):
        question = (prompt if number % 2 else []) + tokens(2, 9)
        answers = [tokens(1, 7) for _ in range(4)]
        answers.append(answers[0][:1])  # one answer begins another
        result += [(question, answer) for answer in answers]
    result += [(tokens(1, 20), tokens(1, 20)) for _ in range(10)]
    result += [(tokens(30, 40), tokens(12, 20)), (tokens(1, 2), tokens(40, 41)), result[3]]
    return [result[number] for number in rng.permutation(len(result))]


def reference(model, asked, max_length: int) -> list[tuple[np.ndarray, bool]]:
    result = []
    for context, continuation in asked:
        inputs = (context + continuation)[-(max_length + 1) :][:-1]
        with torch.no_grad():
            logits = model(torch.tensor([inputs])).logits[0].double()
        logprobs = torch.log_softmax(logits, -1)[-len(continuation) :]
        targets = torch.tensor(continuation)
        chosen = logprobs[torch.arange(len(continuation)), targets]
        result.append((chosen.numpy(), bool((logprobs.argmax(-1) == targets).all())))
    return result


def sharded(params, devices: int):
    mesh = make_mesh(MeshConfig(replica=2 if devices > 1 else 1), jax.devices()[:devices])
    return pad_params(params, param_specs(CONFIG), num_shards(mesh)), mesh


@pytest.fixture(scope="module")
def model():
    return hf_model(CONFIG)


@pytest.mark.parametrize("devices", [1, 8])
def test_every_request_is_scored_as_it_is_alone(model, devices):
    asked = requests()
    expected = reference(model, asked, max_length=40)
    params, mesh = sharded(params_from_hf(model, CONFIG), devices)
    scorer = Scorer(CONFIG, mesh, batch_tokens=512)
    seen = []
    found = scorer.score(params, asked, progress=lambda done, total: seen.append((done, total)))
    for score, (logprobs, greedy) in zip(found, expected, strict=True):
        assert np.max(np.abs(score.logprobs - logprobs)) < 2e-5
        assert score.is_greedy == greedy
        assert score.logprob == pytest.approx(logprobs.sum(), abs=1e-4)
    assert scorer.num_truncated == sum(len(context) + len(rest) > 41 for context, rest in asked) > 0
    assert seen[-1] == (len(asked), len(asked))


def test_greedy_continuations_are_recognised(model):
    context = [5, 17, 99]
    greedy = model.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    other = [*greedy[:-1], (greedy[-1] + 1) % CONFIG.vocab_size]
    params, mesh = sharded(params_from_hf(model, CONFIG), 1)
    asked = [(context, greedy), (context, other), (context, greedy[:2])]
    assert [score.is_greedy for score in Scorer(CONFIG, mesh).score(params, asked)] == [True, False, True]


def test_what_requests_share_is_laid_out_once():
    question, answers = tuple(range(100)), [(7, 8, 9), (7, 3), (5,)]
    rows = pack([Scoring((*question, *answer[:-1]), answer) for answer in answers])
    (row,) = rows
    assert len(row.tokens) == 100 + 1 + 1 + 0  # 7 and 8 of the first answer; the second's 7 is the first's
    assert row.length == row_length(102) == 128
    ends = np.array(row.ends)
    assert np.all(ends > np.arange(len(ends)))
    lone = pack([Scoring(tuple(range(k, k + 64)), (1,)) for k in range(16)])
    assert [row.length for row in lone] == [512, 512]
    assert not any(row.branched for row in lone)


def test_padding_is_small_on_a_spread_of_lengths():
    rng = np.random.default_rng(0)
    asked = [Scoring(tuple(rng.integers(0, 9999, rng.integers(10, 700)).tolist()), (1,)) for _ in range(400)]
    rows = pack(asked)
    assert sorted(number for row in rows for number, _, _ in row.requests) == list(range(400))
    assert sum(row.length for row in rows) < 1.15 * sum(len(request.inputs) for request in asked)


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ([], [1], "request 1: its context has no tokens"),
        ([1], [], "request 1: its continuation has no tokens"),
        ([1], [2] * 41, "request 1: a continuation of 41 tokens, the model reads 40"),
        ([1, 131], [2], "token 131 is outside the model's vocabulary of 131"),
    ],
)
def test_wrong_requests_are_refused(context, continuation, message):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(UserError, match=message):
        Scorer(CONFIG, mesh).score({}, [([1], [2]), (context, continuation)])


def test_a_number_that_is_not_finite_stops_it(model):
    params = params_from_hf(model, CONFIG)
    params["embedding"][77] = np.nan
    params, mesh = sharded(params, 1)
    with pytest.raises(NonFiniteError, match=r"^request 1: a log-probability is nan"):
        Scorer(CONFIG, mesh).score(params, [([1, 2], [3]), ([77, 2], [3])])
