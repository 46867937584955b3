"""The text on which a release is checked: Russian, English and code, written for this repository, or a user's file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from tlite_jax.errors import UserError

LANGUAGES = ("russian", "english", "code")
OWN = "tlite_jax/data/sample"


@dataclass(frozen=True)
class Windows:
    """Rows of tokens, of which the places [first, last) are scored: each predicts the token after it.

    Attributes:
      tokens: [windows, T] int32.
      first, last: last is at most T; where it is T, the last place predicts nothing, and `targets` says 0.
    """

    tokens: np.ndarray
    first: int
    last: int

    def __len__(self) -> int:
        """Windows."""
        return len(self.tokens)

    @property
    def num_scored(self) -> int:
        """S, of one window."""
        return self.last - self.first

    @property
    def targets(self) -> np.ndarray:
        """[windows, S] int32."""
        following = np.pad(self.tokens[:, 1:], ((0, 0), (0, 1)))
        return following[:, self.first : self.last]


def documents(language: str) -> list[str]:
    """The texts of one of LANGUAGES."""
    content = (resources.files("tlite_jax") / "data" / "sample" / f"{language}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in content.splitlines()]


def own_text() -> str:
    """All of it, the languages taking turns by document as long as they last."""
    turns = zip_longest(*(documents(language) for language in LANGUAGES))
    return "\n\n".join(text for text in chain.from_iterable(turns) if text is not None)


def read_text(path: Path) -> str:
    """A user's sample.

    Raises:
      UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read --sample {path}: {reason}") from error


def half_windows(ids: Sequence[int], bos: int | None, context: int, most: int) -> Windows:
    """Windows as llama.cpp's perplexity cuts them: beside each other, the second half of each scored.

    Args:
      ids: of the whole text, without special tokens.
      bos: stands in place of a window's first token; None: nothing does.
      context: T.
      most: windows.

    Raises:
      UserError: the text is shorter than two windows, as llama.cpp demands too.
    """
    count = min(len(ids) // context, most)
    if len(ids) < 2 * context:
        raise UserError(f"the sample has {len(ids)} tokens, {2 * context} are needed; give a longer one with --sample")
    tokens = np.array(ids[: count * context], np.int32).reshape(count, context)
    if bos is not None:
        tokens[:, 0] = bos
    return Windows(tokens, context // 2, context - 1)


def whole_windows(texts: Sequence[Sequence[int]], length: int) -> Windows:
    """A window for each text, cut to `length` or to the shortest; every place is looked at."""
    length = min(length, *(len(ids) for ids in texts))
    return Windows(np.array([ids[:length] for ids in texts], np.int32), 0, length)
