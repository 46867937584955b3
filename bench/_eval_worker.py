"""A contender of the evaluation benchmark: a process that answers questions on standard input with lines of JSON.

choices, lone: log-likelihoods of multiple-choice and of single requests (theirs: batch size, and "exact" or "default");
seconds, CPU seconds, number of requests, the answers. decode B: greedy tokens after B prompts. facts: torch's BLAS, and
tokens that we computed and that were needed.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOKENS = 32
Answer = dict[str, Any]


def main() -> None:
    """Answers until standard input ends."""
    name, problem, questions, new_tokens, threads = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    if name == "ours" and hasattr(os, "sched_setaffinity"):
        # XLA's pool has as many threads as the process may use cores when jax first looks for devices.
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    contender = (_Ours if name == "ours" else _Theirs)(problem, new_tokens, threads)
    requests = {kind: make(contender.tokenizer, questions) for kind, make in (("choices", choices), ("lone", lone))}
    for line in sys.stdin:
        question, *words = line.split()
        if question == "facts":
            print(json.dumps(contender.facts()), flush=True)
        elif question == "decode":
            prompts = make_prompts(contender.tokenizer, int(words[0]))
            print(json.dumps(_timed(lambda prompts=prompts: contender.decode(prompts))), flush=True)
        else:
            asked = requests[question]
            print(json.dumps(_timed(lambda: contender.score(asked, *words))), flush=True)  # noqa: B023


def _timed(work: Callable[[], list[Any]]) -> Answer:
    cpu, start = time.process_time(), time.perf_counter()
    result = work()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "count": len(result), "result": result}


def sample_texts() -> list[str]:
    """The texts that are part of the package, Russian and English."""
    sample = Path(__file__).resolve().parent.parent / "tlite_jax" / "data" / "sample"
    files = [file for file in sorted(sample.glob("*.jsonl")) if "code" not in file.name]
    return [json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def choices(tokenizer: Any, count: int) -> list[tuple[str, str]]:
    """Questions of 20 to 100 tokens, four answers of 1 to 12 tokens each."""
    rng = np.random.default_rng(0)
    result = []
    for _ in range(count):
        question = _excerpt(tokenizer, rng, int(rng.integers(20, 100)))
        result += [(question, " " + _excerpt(tokenizer, rng, int(rng.integers(1, 12)))) for _ in range(4)]
    return result


def lone(tokenizer: Any, count: int) -> list[tuple[str, str]]:
    """Contexts of 20 to 200 tokens, each with one continuation."""
    rng = np.random.default_rng(1)
    return [
        (_excerpt(tokenizer, rng, int(rng.integers(20, 200))), " " + _excerpt(tokenizer, rng, int(rng.integers(1, 12))))
        for _ in range(count)
    ]


def make_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of equal length."""
    rng = np.random.default_rng(2)
    return [tokenizer.encode(_excerpt(tokenizer, rng, 2 * PROMPT_TOKENS))[:PROMPT_TOKENS] for _ in range(count)]


def _excerpt(tokenizer: Any, rng: np.random.Generator, tokens: int) -> str:
    texts = sample_texts()
    ids: list[int] = []
    while len(ids) < tokens + 5:
        ids += tokenizer.encode(texts[int(rng.integers(len(texts)))], add_special_tokens=False)
    first = int(rng.integers(0, len(ids) - tokens))
    return str(tokenizer.decode(ids[first : first + tokens])).strip("\ufffd ") or "a"


class _Ours:
    def __init__(self, problem: Path, new_tokens: int, threads: int):
        from launch.language_model import open_language_model

        del threads
        self._model, self._new_tokens = open_language_model(problem), new_tokens
        self.tokenizer = self._model.tokenizer
        self._loaded = self._model.generator.load(self._model.params)
        self._needed_tokens = 0

    def facts(self) -> Answer:
        return {"computed_tokens": self._model.scorer.num_computed_tokens, "needed_tokens": self._needed_tokens}

    def score(self, requests: list[tuple[str, str]]) -> list[Any]:
        pairs = [self._model.encode_pair(*request) for request in requests]
        self._needed_tokens += sum(len(context) + len(rest) - 1 for context, rest in pairs)
        return [(scored.logprob, scored.is_greedy, len(scored.logprobs)) for scored in self._model.score_tokens(pairs)]

    def decode(self, prompts: list[list[int]]) -> list[Any]:
        decoding = self._model.generator.start(self._loaded, prompts, max_new_tokens=self._new_tokens)
        while not decoding.done:
            decoding.advance(32)
        return [token for tokens in decoding.tokens for token in tokens]


class _Theirs:
    def __init__(self, problem: Path, new_tokens: int, threads: int):
        import torch
        import transformers

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        torch.set_num_threads(threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            problem, dtype=torch.float32, trust_remote_code=False
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(problem, trust_remote_code=False)
        self._new_tokens = new_tokens

    def facts(self) -> Answer:
        from bench import _torch_baseline

        return {"blas": _torch_baseline.blas()}

    def score(self, requests: list[tuple[str, str]], batch_size: str, cache: str) -> list[Any]:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            pretrained=self._model,
            tokenizer=self.tokenizer,
            batch_size=int(batch_size),
            logits_cache=cache == "default",
            softmax_dtype="float32" if cache == "exact" else None,
            device="cpu",
        )
        asked = [
            Instance(request_type="loglikelihood", doc={}, arguments=request, idx=number)
            for number, request in enumerate(requests)
        ]
        return [(logprob, greedy, 0) for logprob, greedy in model.loglikelihood(asked, disable_tqdm=True)]

    def decode(self, prompts: list[list[int]]) -> list[Any]:
        import torch

        ids = torch.tensor(prompts)
        written = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=self._new_tokens,
            max_new_tokens=self._new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return written[:, ids.shape[1] :].flatten().tolist()


def write_tiny(directory: Path) -> Path:
    """A random small model and a tokenizer, as a Hugging Face directory."""
    import jax

    from launch.quickstart_parts.base_model import tiny_tokenizer
    from tlite_jax.bridge.hf import export_hf
    from tlite_jax.config import ModelConfig
    from tlite_jax.model.decoder import init_params

    model = ModelConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    tokenizer = tiny_tokenizer(directory.parent / "tokenizer", sample_texts(), model.vocab_size)
    params = jax.tree.map(np.asarray, init_params(model, 0))
    export_hf(params, model, directory, tokenizer, "float32")
    return directory


if __name__ == "__main__":
    main()
