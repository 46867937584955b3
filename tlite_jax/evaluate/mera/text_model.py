"""MERA's questions put to a model of ours, with the conventions of its release 1.1.0.

Texts are encoded without any special token. The whole text is scored, not only the continuation: its first token is
read, all others are scored. What is too long loses its beginning.
"""

import dataclasses
from collections.abc import Sequence

from tlite_jax.evaluate.language_model import LanguageModel
from tlite_jax.evaluate.mera.model import Progress
from tlite_jax.generate import Sampling

# As transformers samples where a model's generation_config.json says nothing.
USUAL_SAMPLING = Sampling(temperature=1.0, top_k=50)
_PROMPTS_AT_A_TIME = 512  # between two reports of progress


class MeraModel:
    """A `TextModel` (evaluate/mera/model.py) made of a language model.

    Args:
      model: with its tokenizer.
      sampling: of ruHumanEval's programs; its repetition penalty holds for all answers.

    Attributes:
      num_truncated: texts and contexts that lost their beginning.
    """

    def __init__(self, model: LanguageModel, sampling: Sampling = USUAL_SAMPLING):
        self._model, self._sampling = model, sampling
        self.num_truncated = 0

    def score(self, pairs: Sequence[tuple[str, str]], progress: Progress) -> list[float]:
        """See TextModel.

        Continuations of one context that follow each other share its tokens: what all of them begin with is scored
        once and added to each, so that rounding of a long context cannot turn the order of short continuations.
        """
        requests: list[tuple[list[int], list[int]]] = []
        parts: list[tuple[int | None, int]] = []  # of each pair: request of the common beginning, request of the rest
        first = 0
        while first < len(pairs):
            last = first
            while last < len(pairs) and pairs[last][0] == pairs[first][0]:
                last += 1
            texts = [self._encode(context + continuation) for context, continuation in pairs[first:last]]
            common = _common_length(texts)
            beginning = None
            if common > 1:
                beginning = len(requests)
                requests.append((texts[0][:1], texts[0][1:common]))
            for text in texts:
                parts.append((beginning, len(requests)))
                requests.append((text[:common], text[common:]))
            first = last
        scores = [scored.logprob for scored in self._model.score_tokens(requests, _scaled(progress, len(pairs)))]
        return [scores[rest] + (0.0 if beginning is None else scores[beginning]) for beginning, rest in parts]

    def generate(
        self, contexts: Sequence[str], *, stops: Sequence[str], max_tokens: int, seed: int | None, progress: Progress
    ) -> list[str]:
        """See TextModel."""
        prompts = [self._model.encode(context, add_special_tokens=False) for context in contexts]
        self.num_truncated += sum(len(prompt) > self._model.max_length - max_tokens for prompt in prompts)
        if seed is None:
            sampling = Sampling(repetition_penalty=self._sampling.repetition_penalty)
        else:
            sampling = dataclasses.replace(self._sampling, seed=seed)
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        texts: dict[int, str] = {}
        for first in range(0, len(order), _PROMPTS_AT_A_TIME):
            numbers = order[first : first + _PROMPTS_AT_A_TIME]
            written = self._model.write(
                [prompts[number] for number in numbers],
                max_new_tokens=max_tokens,
                stops=stops,
                sampling=sampling,
                truncate=True,
                streams=numbers,
            )
            texts |= {number: found.text for number, found in zip(numbers, written, strict=True)}
            progress(len(texts), len(prompts))
        return [texts[number] for number in range(len(prompts))]

    def _encode(self, text: str) -> list[int]:
        tokens = self._model.encode(text, add_special_tokens=False)
        self.num_truncated += len(tokens) > self._model.max_length
        return tokens[-self._model.max_length :]


def _common_length(texts: Sequence[Sequence[int]]) -> int:
    """Tokens that all texts begin with, each of them keeping at least its last token; at least one."""
    most = max(1, min(len(text) for text in texts) - 1)
    columns = zip(*(text[:most] for text in texts), strict=True)
    return max(1, next((place for place, column in enumerate(columns) if len(set(column)) > 1), most))


def _scaled(progress: Progress, total: int) -> Progress:
    return lambda done, asked: progress(done * total // asked, total)
