"""What MERA asks of a language model."""

from collections.abc import Callable, Sequence
from typing import Protocol

MAX_NEW_TOKENS = 256  # of an answer; a longer context keeps its last `max_length - MAX_NEW_TOKENS` tokens

Progress = Callable[[int, int], None]  # (done, all)


class TextModel(Protocol):
    """A model that reads and writes text, without any token of its own before it."""

    def score(self, pairs: Sequence[tuple[str, str]], progress: Progress) -> list[float]:
        """Log-likelihood in nats of each whole text, context and continuation alike, given its first token.

        A text is encoded in one piece and cut on the left to the model's length. `progress` is called with (done, all).
        """
        ...

    def generate(
        self,
        contexts: Sequence[str],
        *,
        stops: Sequence[str],
        max_tokens: int,
        seed: int | None,
        progress: Progress,
    ) -> list[str]:
        """What the model writes after each context, up to the first stop string, which is left out.

        Args:
          contexts: what to go on with.
          stops: strings that end an answer; the end-of-text token does too.
          max_tokens: most tokens of an answer.
          seed: of the sampling, the same for every context; None: greedy.
          progress: called with (done, all).
        """
        ...
