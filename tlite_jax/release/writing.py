"""A few greedy continuations, and whether they are text at all."""

from collections.abc import Sequence
from typing import Any

from tlite_jax.evaluate.language_model import LanguageModel
from tlite_jax.release.result import Generated

PROMPTS = (
    "Чтобы установить пакет, нужно",
    "The capital of France is",
    "def add(a, b):\n    return",
)
NUM_TOKENS = 32
_WATCHED = 16  # tokens at the beginning, that must not be one short loop
_LONGEST_LOOP = 2


def continuations(model: LanguageModel, source: str) -> list[tuple[Generated, Sequence[int]]]:
    """Continues each of PROMPTS greedily; returns texts and token ids.

    Raises:
      FloatingPointError: logits that are not finite.
    """
    written: Any = model.write([model.encode(prompt) for prompt in PROMPTS], max_new_tokens=NUM_TOKENS)
    return [
        (Generated(source=source, prompt=prompt, text=answer.text, num_tokens=len(answer.tokens)), answer.tokens)
        for prompt, answer in zip(PROMPTS, written, strict=True)
    ]


def is_degenerate(ids: Sequence[int]) -> bool:
    """Whether a text is one or two tokens over and over from its start: what broken weights or RoPE tend to write."""
    start = list(ids[:_WATCHED])
    if len(start) < _WATCHED:
        return False
    return any(start[loop:] == start[:-loop] for loop in range(1, _LONGEST_LOOP + 1))


def agreement(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two continuations begin with alike."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
