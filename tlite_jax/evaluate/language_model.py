"""A model with its tokenizer: scores and continues text, with the conventions of lm-evaluation-harness's HFLM.

lm-evaluation-harness itself is not needed here (`evaluate.harness` plugs this into it), so MERA and the training loop
use the same.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tlite_jax.config import ModelConfig
from tlite_jax.errors import UserError
from tlite_jax.evaluate.scoring import BATCH_TOKENS, Progress, Scored, Scorer


class LanguageModel:
    """A model on a mesh, its parameters sharded as in training, and its tokenizer.

    Args:
      params: stored, sharded parameters; the attribute may be set anew while a model is trained.
      model: shape of the model.
      mesh: from `make_mesh`.
      tokenizer: from transformers; None: token ids only.
      dtype: to compute in.
      max_length: most tokens that are read at once; None: the model's.
      batch_tokens: tokens at a time on each device.
    """

    def __init__(
        self,
        params: Any,
        model: ModelConfig,
        mesh: Mesh,
        tokenizer: Any,
        *,
        dtype: str = "float32",
        max_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ):
        self.params, self.model, self.mesh, self.tokenizer = params, model, mesh, tokenizer
        self.dtype = dtype
        self.scorer = Scorer(model, mesh, dtype=dtype, max_length=max_length, batch_tokens=batch_tokens)

    @property
    def max_length(self) -> int:
        """Most tokens that are read at once."""
        return self.scorer.max_length

    @property
    def end_id(self) -> int:
        """The tokenizer's eos."""
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos token; name one in its tokenizer_config.json")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_id(self) -> int:
        """What stands before a text that has no context: bos, or eos where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.end_id if bos is None else int(bos)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids; by default with the special tokens that the tokenizer adds, unless the text begins with bos."""
        if add_special_tokens is None and text.startswith(self.tokenizer.decode(self.prefix_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(text, **options))

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what follows it, cut where the context's own tokens end.

        Spaces at the end of the context go over to the continuation; an empty context becomes the prefix token.
        """
        if context == "":
            rest = self.encode(continuation, add_special_tokens=False)
            return (rest[:1], rest[1:]) if rest[:1] == [self.prefix_id] else ([self.prefix_id], rest)
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole = self.encode(context + continuation)
        return (first := self.encode(context)), whole[len(first) :]

    def score_tokens(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Progress | None = None
    ) -> list[Scored]:
        """Scores (context, continuation) pairs of token ids; see `Scorer.score`."""
        return self.scorer.score(self.params, requests, progress)

    def score(self, requests: Sequence[tuple[str, str]], progress: Progress | None = None) -> list[Scored]:
        """Scores (context, continuation) pairs of text."""
        return self.score_tokens([self.encode_pair(*request) for request in requests], progress)

    def score_texts(self, texts: Sequence[str], progress: Progress | None = None) -> list[float]:
        """Log-likelihoods of whole texts in nats, in windows of max_length tokens that do not overlap.

        The first window's context is the prefix token; a later one's is the token before it, or, for the last, as much
        as makes it full. Follows lm-evaluation-harness's rolling log-likelihood.
        """
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            for window in rolling_windows(self.encode(text), self.prefix_id, self.max_length):
                windows.append(window)
                owners.append(number)
        totals = np.zeros(len(texts), np.float64)
        for owner, scored in zip(owners, self.score_tokens(windows, progress), strict=True):
            totals[owner] += scored.logprob
        return totals.tolist()


def rolling_windows(tokens: Sequence[int], prefix: int, length: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) pairs that score each token once; a window's input is `length` tokens at most."""
    windows = []
    padded = [prefix, *tokens]
    for first in range(0, len(tokens), length):
        last = min(first + length, len(tokens))
        # Input places of a full window end at the last token but one; it begins at the prefix or later.
        begin = max(0, last - length) if first else 0
        windows.append((padded[begin : first + 1], list(tokens[first:last])))
    return windows
