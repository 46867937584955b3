"""A model with its tokenizer: scores and continues text, with the conventions of lm-evaluation-harness's HFLM.

lm-evaluation-harness itself is not needed here (`evaluate.harness` plugs this into it), so MERA and the training loop
use the same.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tlite_jax.config import ModelConfig
from tlite_jax.errors import UserError
from tlite_jax.evaluate.scoring import BATCH_TOKENS, Progress, Scored, Scorer
from tlite_jax.generate import GREEDY, Generator, Sampling, Written, write


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
      end_ids: ids that end a text besides the tokenizer's eos.
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
        end_ids: Sequence[int] = (),
    ):
        self.params, self.model, self.mesh, self.tokenizer = params, model, mesh, tokenizer
        self.dtype, self._more_end_ids = dtype, tuple(end_ids)
        self.num_truncated_prompts = 0
        self.scorer = Scorer(model, mesh, dtype=dtype, max_length=max_length, batch_tokens=batch_tokens)

    @property
    def max_length(self) -> int:
        """Most tokens that are read at once."""
        return self.scorer.max_length

    @functools.cached_property
    def generator(self) -> Generator:
        """Compiled when text is first written."""
        return Generator(self.model, self.mesh, dtype=self.dtype)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a text: the tokenizer's eos and those of the model's generation_config.json."""
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([*([] if eos is None else [int(eos)]), *self._more_end_ids]))

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

    def chat_text(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's chat template writes it, special tokens included.

        Without the system message where the template refuses one. `add_generation_prompt` false: the last message is
        left open, to be gone on with.

        Raises:
          UserError: the tokenizer has no chat template.
        """
        import jinja2

        if not self.tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template: leave the chat option out, or import the model with the tokenizer "
                "files of its instruction-tuned sibling"
            )

        def render(chosen: Sequence[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    list(chosen),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        try:
            return render(messages)
        except jinja2.exceptions.TemplateError:
            return render([message for message in messages if message["role"] != "system"])

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

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stops: Sequence[str] = (),
        sampling: Sampling = GREEDY,
        truncate: bool = False,
        **options: Any,
    ) -> list[Written]:
        """Continues prompts of token ids until an end id, a stop string or `max_new_tokens`.

        Args:
          prompts: at least one token each.
          max_new_tokens: most tokens of each.
          stops: strings that end a text and are left out of it; one that is a special token ends it by its id.
          sampling: how tokens are chosen; draws depend on the seed and a prompt's place, not on its batch.
          truncate: cut the beginning of prompts that leave no room for max_new_tokens, and count them in
            `num_truncated_prompts`; otherwise they are refused.
          options: of `tlite_jax.generate.write`: streams, on_text, steps.

        Raises:
          UserError: an empty prompt, more than the model's context.
          FloatingPointError: logits that are not finite.
        """
        room = self.max_length - max_new_tokens
        if truncate and room < 1:
            raise UserError(
                f"{max_new_tokens} new tokens leave no room for a prompt in the model's context of {self.max_length}"
            )
        if truncate:
            self.num_truncated_prompts += sum(len(prompt) > room for prompt in prompts)
            prompts = [prompt[-room:] for prompt in prompts]
        special = self._special_ids(stops)
        return write(
            self.generator,
            self.params,
            prompts,
            self.decode,
            max_new_tokens=max_new_tokens,
            stops=[stop for stop in stops if stop not in special],
            stop_ids=tuple(dict.fromkeys([*self.end_ids, *special.values()])),
            sampling=sampling,
            **options,
        )

    def _special_ids(self, stops: Sequence[str]) -> dict[str, int]:
        """Stop strings that are special tokens, which decoded text does not show."""
        added = self.tokenizer.added_tokens_decoder.items()
        special = {token.content: number for number, token in added if token.special}
        return {stop: special[stop] for stop in stops if stop in special}


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
