"""Requests of every kind that lm-evaluation-harness makes, in Russian and English, and its HFLM to answer them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.data.written_texts import ENGLISH, RUSSIAN

Request = tuple[Any, ...]


def sentences(rng: np.random.Generator, count: int) -> str:
    """Some sentences, of either language."""
    texts = RUSSIAN if rng.random() < 0.5 else ENGLISH
    return " ".join(texts[number] for number in rng.integers(0, len(texts), count))


def loglikelihood_requests(count: int, longest: int, seed: int = 0) -> list[Request]:
    """(context, continuation): choices behind one question, spaces at edges, empty contexts, copies, some too long."""
    rng = np.random.default_rng(seed)
    requests: list[Request] = []
    while len(requests) < count:
        kind = len(requests) % 7
        context = sentences(rng, 1)
        if kind == 0:
            requests += [(context, f" {sentences(rng, 1)[:size]}") for size in (4, 9, 20, 20)]
        elif kind == 1:
            requests += [(context, answer) for answer in (" A", " B", " C", " D")]
        elif kind == 2:
            requests.append((context + "  ", sentences(rng, 1)[:12]))
        elif kind == 3:
            requests.append(("", sentences(rng, 1)[:30]))
        elif kind == 4:
            requests.append((sentences(rng, 1 + longest // 8)[: 8 * longest], "\n" + sentences(rng, 1)[:15]))
        elif kind == 5:  # which a real model copies
            words = context.split(" ")
            requests.append((f"{context} {context} {' '.join(words[:3])}", f" {' '.join(words[3:5])}"))
        else:
            requests.append((context[:1], context[1:25]))
    return [requests[number] for number in rng.permutation(count)]


def rolling_requests(count: int, longest: int, seed: int = 1) -> list[Request]:
    """(text,), from one word to several windows, one of them empty."""
    rng = np.random.default_rng(seed)
    texts = [
        sentences(rng, 1 + int(rng.integers(0, 6)))[: int(rng.integers(1, 12 * longest))] for _ in range(count - 1)
    ]
    return [(text,) for text in ["", *texts]]


def generation_requests(count: int, longest: int, tokens: int, seed: int = 2) -> list[Request]:
    """(context, generation_kwargs): with and without stops, a few lengths, some contexts too long."""
    rng = np.random.default_rng(seed)
    options: Sequence[dict[str, Any]] = (
        {"until": ["\n\n", "."], "max_gen_toks": tokens, "do_sample": False},
        {"until": [" и", " the"], "max_gen_toks": tokens // 2},
        {"max_gen_toks": tokens, "temperature": 0.0},
    )
    contexts = [
        sentences(rng, 1)[: int(rng.integers(1, 60))] if number % 5 else sentences(rng, 1 + longest // 8)
        for number in range(count)
    ]
    return [(context, dict(options[number % len(options)])) for number, context in enumerate(contexts)]


def instances(kind: str, requests: Sequence[Request]) -> list[Any]:
    """The harness's objects."""
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=request, idx=number)  # type: ignore[arg-type]
        for number, request in enumerate(requests)
    ]


def hugging_face(model: Any, tokenizer: Any, *, max_length: int, batch_size: int = 8, softmax: str = "float32") -> Any:
    """HFLM over a model of transformers, as exact as it gets."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        logits_cache=False,
        softmax_dtype=softmax,
        device="cpu",
    )
