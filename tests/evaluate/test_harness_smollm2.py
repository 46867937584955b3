"""Real weights against transformers: 300 requests of each kind that the harness makes, and greedy texts.

make test-smollm2 runs these: some minutes on two cores.
"""

import numpy as np
import pytest
import torch

from tests.data.written_texts import ENGLISH, RUSSIAN
from tests.evaluate import harness_requests as make
from tests.evaluate import smollm2

LENGTH, COUNT = 160, 300
PROMPT_COUNT, NEW_TOKENS = 24, 128
pytestmark = pytest.mark.timeout(7200)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return smollm2.load(tmp_path_factory.mktemp("tokenizer"), LENGTH)


@pytest.fixture(scope="module")
def found(both):
    pytest.importorskip("lm_eval", reason="make test-smollm2 installs it")
    from tlite_jax.evaluate.harness import HarnessModel

    return HarnessModel(both.ours)


@pytest.fixture(scope="module")
def reference(both):
    pytest.importorskip("accelerate", reason="make test-smollm2 installs it")
    return make.hugging_face(both.theirs, both.ours.tokenizer, max_length=LENGTH, batch_size=16)


def test_smollm2_loglikelihoods_equal_hflm(found, reference):
    asked = make.instances("loglikelihood", make.loglikelihood_requests(COUNT, LENGTH))
    expected, answers = reference.loglikelihood(asked), found.loglikelihood(asked)
    tokens = [len(found.model.encode_pair(*instance.args)[1]) for instance in asked]
    differences = [
        abs(ours[0] - theirs[0]) / count for ours, theirs, count in zip(answers, expected, tokens, strict=True)
    ]
    print(f"{COUNT} requests, {sum(tokens)} scored tokens: at most {max(differences):.2e} a token")
    assert max(differences) <= 1e-4
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
    assert 0 < sum(greedy for _, greedy in answers) < COUNT
    assert found.model.scorer.num_truncated > 0


def test_smollm2_rolling_loglikelihoods_equal_hflm(both, found):
    """With torch's log-softmax in float64: in float32 its sum of 49,152 terms is 2e-6 of a text's score too small."""
    pytest.importorskip("accelerate", reason="make test-smollm2 installs it")
    reference = make.hugging_face(both.theirs, both.ours.tokenizer, max_length=LENGTH, batch_size=8, softmax="float64")
    asked = make.instances("loglikelihood_rolling", make.rolling_requests(COUNT, LENGTH // 8))
    answers, expected = np.array(found.loglikelihood_rolling(asked)), np.array(reference.loglikelihood_rolling(asked))
    tokens = np.array([len(found.tok_encode(instance.args[0])) for instance in asked])
    differences = np.abs(answers - expected)[1:] / tokens[1:]
    relative = abs(answers.sum() - expected.sum()) / abs(expected.sum())
    print(
        f"{COUNT} texts, {tokens.sum()} tokens: at most {differences.max():.2e} a token, all: {relative:.1e} of the sum"
    )
    assert answers[0] == expected[0] == 0
    assert differences.max() <= 1e-4
    assert relative <= 1e-6


def test_smollm2_harness_texts_equal_hflm(found, reference):
    asked = make.instances("generate_until", make.generation_requests(COUNT, LENGTH, tokens=12))
    expected, answers = reference.generate_until(asked), found.generate_until(asked)
    print(f"{COUNT} texts, {len(set(expected))} distinct, {found.model.num_truncated_prompts} prompts cut")
    assert answers == expected


def test_smollm2_greedy_tokens_equal_transformers(both):
    """24 prompts, Russian and English, 128 tokens each. Where two tokens' logits differ by less than float32 can tell
    after 30 layers (1e-3), the two may choose differently; such a tie is counted and its text compared up to it.
    """
    ours, theirs = both
    texts = [text[:40] for pair in zip(RUSSIAN, ENGLISH, strict=False) for text in pair][:PROMPT_COUNT]
    if len(texts) < PROMPT_COUNT:
        texts += [text[5:50] for text in [*RUSSIAN, *ENGLISH]][: PROMPT_COUNT - len(texts)]
    prompts = [ours.encode(text) for text in texts]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
    )[:, longest:].tolist()
    decoding = ours.generator.start(ours.generator.load(ours.params), prompts, max_new_tokens=NEW_TOKENS)
    while not decoding.done:
        decoding.advance(32)
    ties = 0
    for prompt, found, wanted in zip(prompts, decoding.tokens, expected, strict=True):
        if found != wanted:
            place = next(number for number in range(NEW_TOKENS) if found[number] != wanted[number])
            with torch.no_grad():
                logits = theirs(torch.tensor([[*prompt, *wanted[:place]]])).logits[0, -1]
            gap = abs(float(logits[found[place]] - logits[wanted[place]]))
            print(f"a tie after {place} tokens: logits differ by {gap:.1e}")
            assert gap < 1e-3
            ties += 1
    print(f"{len(prompts)} prompts, {NEW_TOKENS} tokens: {len(prompts) - ties} equal throughout, {ties} up to a tie")
    assert ties <= 2
