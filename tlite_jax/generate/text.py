"""Tokens into text as they come: whole characters, up to a stop string wherever tokens divide it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tlite_jax.generate.decoding import MOST_STEPS, Generator
from tlite_jax.generate.sampling import GREEDY, Sampling

CACHE_TOKENS = 1 << 16  # places of the KV cache on each device, of all sequences of a batch
MOST_ROWS = 64  # sequences at a time on each device
_INCOMPLETE = "\ufffd"  # what a tokenizer decodes part of a character to
Decode = Callable[[Sequence[int]], str]
OnText = Callable[[int, str], None]


class TextStream:
    """The text of one sequence of tokens.

    Args:
      decode: token ids -> text.
      stops: strings that end the text, themselves left out.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()):
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._shown = 0
        self.text = ""
        self.stopped = False

    def feed(self, tokens: Sequence[int]) -> str:
        """Takes more tokens; returns the text that is certain by now and was not returned before."""
        if self.stopped or not tokens:
            return ""
        self._tokens += tokens
        self.text = self._decode(self._tokens)
        ends = [place for stop in self._stops if (place := self.text.find(stop)) >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True
        return self._show(len(self.text) if self.stopped else self._certain())

    def finish(self) -> str:
        """Returns the rest of the text, after the last token."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new

    def _certain(self) -> int:
        """The length of the text without the beginning of a character or of a stop string at its end."""
        end = len(self.text.rstrip(_INCOMPLETE))
        longest = max(map(len, self._stops), default=0)
        for size in range(min(longest - 1, end), 0, -1):
            if any(self.text[end - size : end] == stop[:size] for stop in self._stops):
                return end - size
        return end


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt.

    Attributes:
      text: up to a stop string or the end.
      tokens: ids, an end token or those of a stop string included.
      ending: "end" (a stop id), "stop" (a stop string) or "length".
    """

    text: str
    tokens: tuple[int, ...]
    ending: str


def write(
    generator: Generator,
    params: Any,
    prompts: Sequence[Sequence[int]],
    decode: Decode,
    *,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    streams: Sequence[int] | None = None,
    on_text: OnText | None = None,
    steps: int = MOST_STEPS,
) -> list[Written]:
    """Continues prompts, in batches of like length.

    Args:
      generator: of the model.
      params: stored, sharded parameters.
      prompts: token ids, at least one each.
      decode: token ids -> text.
      max_new_tokens: most tokens of each, at least 1.
      stops: strings that end a text and are left out of it.
      stop_ids: ids that end a text.
      sampling: how tokens are chosen.
      streams: a number for each prompt that its draws follow besides the seed; None: its place in `prompts`.
      on_text: called with (number of the prompt, new text) as text comes.
      steps: tokens between looks at the text; fewer for a smooth stream, more for speed.

    Raises:
      UserError: an empty prompt, an unknown id, more than the model's context.
      FloatingPointError: logits that are not finite; names the prompt's place in its batch.
    """
    streams = range(len(prompts)) if streams is None else streams
    loaded = generator.load(params)
    results: dict[int, Written] = {}
    for batch in _batches(prompts, max_new_tokens, generator.mesh.size):
        decoding = generator.start(
            loaded,
            [prompts[number] for number in batch],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=sampling,
            streams=[streams[number] for number in batch],
        )
        texts = [TextStream(decode, stops) for _ in batch]
        fed = [0] * len(batch)
        while True:
            for row, number in enumerate(batch):
                tokens = decoding.tokens[row]
                new = texts[row].feed([token for token in tokens[fed[row] :] if token not in stop_ids])
                fed[row] = len(tokens)
                if texts[row].stopped:
                    decoding.end(row)
                if not decoding.alive[row]:
                    new += texts[row].finish()
                if new and on_text is not None:
                    on_text(number, new)
            if decoding.done:
                break
            decoding.advance(steps)
        for row, number in enumerate(batch):
            results[number] = _written(texts[row], decoding.tokens[row], stop_ids)
    return [results[number] for number in range(len(prompts))]


def _written(text: TextStream, tokens: Sequence[int], stop_ids: Sequence[int]) -> Written:
    ending = "stop" if text.stopped else "end" if tokens and tokens[-1] in stop_ids else "length"
    return Written(text.text, tuple(tokens), ending)


def _batches(prompts: Sequence[Sequence[int]], max_new_tokens: int, devices: int) -> Iterator[list[int]]:
    """Numbers of prompts, longest first, as many at a time as the cache holds."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    while order:
        places = len(prompts[order[0]]) + max_new_tokens
        most = devices * min(MOST_ROWS, max(1, CACHE_TOKENS // places))
        yield order[:most]
        order = order[most:]
