"""Text -> hashed words with their places, in bulk: how texts are compared whatever their case and punctuation.

A word is a run of letters and digits. Texts are brought to NFC; case is folded where that is one character for one;
ё counts as е; combining marks that NFC leaves, such as the stress of Russian dictionaries, are passed over.
"""

import functools
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlite_jax.data.permutation import mix64

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

# Characters hashed at once: temporary arrays take some 60 bytes a character.
_PIECE = 1 << 20
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_BETWEEN, _PASSED_OVER = np.uint32(0), np.uint32(1)


@dataclass(frozen=True)
class HashedWords:
    """The words of several texts, one text after another.

    Attributes:
      hashes: uint64 [words].
      starts, ends: int64 [words], characters from the beginning of the word's text.
      texts: int64 [words], the number of the word's text, ascending.
    """

    hashes: Words
    starts: Ints
    ends: Ints
    texts: Ints


def normalised(text: str) -> str:
    """Returns a text in NFC, the form that places of words count in."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def hash_words(texts: Sequence[str]) -> HashedWords:
    """Hashes the words of texts that are `normalised`."""
    parts = [_hash_pieces(texts, group) for group in _groups(texts)]
    joined = [np.concatenate(columns) for columns in zip(*parts, strict=True)] if parts else [np.empty(0, np.int64)] * 4
    return HashedWords(joined[0].astype(np.uint64, copy=False), joined[1], joined[2], joined[3])


def ngrams(words: HashedWords, longest: int) -> Iterator[tuple[int, Words, Ints]]:
    """Yields n, hashes of the n-grams that lie inside a text, and their first words, for n = 1..longest."""
    hashes = np.zeros(len(words.hashes), np.uint64)
    for n in range(1, longest + 1):
        count = len(words.hashes) - n + 1
        if count <= 0:
            return
        hashes = hashes[:count] * _FACTOR + words.hashes[n - 1 :]
        first = np.flatnonzero(words.texts[:count] == words.texts[n - 1 :])
        yield n, mix64(hashes[first] ^ np.uint64(n)), first


def _groups(texts: Sequence[str]) -> Iterator[list[tuple[int, int, int]]]:
    """Gathers pieces of texts (number, start, end), so that many short ones are hashed at once."""
    group, size = list[tuple[int, int, int]](), 0
    for piece in _pieces(texts):
        if group and size + piece[2] - piece[1] > _PIECE:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece[2] - piece[1] + 1
    if group:
        yield group


def _pieces(texts: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Cuts texts into pieces of bounded size, at a space or line end where there is one."""
    for number, text in enumerate(texts):
        start = 0
        while start < len(text):
            end = min(start + _PIECE, len(text))
            if end < len(text):
                space = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
                end = space if space > start else end
            yield number, start, end
            start = end


def _hash_pieces(texts: Sequence[str], group: Sequence[tuple[int, int, int]]) -> tuple[Words, Ints, Ints, Ints]:
    """Returns hashes, starts, ends and texts of the words of some pieces."""
    joined = "\n".join([texts[number][start:end] for number, start, end in group])
    numbers, starts, ends = (np.array(column) for column in zip(*group, strict=True))
    begins = np.cumsum(ends - starts + 1) - (ends - starts + 1)
    hashes, firsts, lasts = _hash(joined)
    piece = np.searchsorted(begins, firsts, side="right") - 1
    offset = starts[piece] - begins[piece]
    return hashes, firsts + offset, lasts + 1 + offset, numbers[piece]


def _hash(text: str) -> tuple[Words, Ints, Ints]:
    """Returns the hash and the first and last character of every word."""
    folded = _table()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]
    places = np.flatnonzero(folded != _PASSED_OVER)
    folded = folded[places]
    inside = np.zeros(len(folded) + 2, bool)
    inside[1:-1] = folded != _BETWEEN
    firsts = np.flatnonzero(inside[1:] & ~inside[:-1])
    lasts = np.flatnonzero(inside[:-1] & ~inside[1:]) - 1
    lengths = lasts - firsts + 1
    begins = np.cumsum(lengths) - lengths
    letters = folded[inside[1:-1]].astype(np.uint64)
    position = np.arange(len(letters), dtype=np.uint64) - np.repeat(begins, lengths).astype(np.uint64)
    values = mix64(letters | (position << np.uint64(32)))
    hashes = np.add.reduceat(values, begins) if len(firsts) else np.empty(0, np.uint64)
    return mix64(hashes), places[firsts], places[lasts]


@functools.cache
def _table() -> npt.NDArray[np.uint32]:
    """Code point -> folded code point, _BETWEEN for what separates words, _PASSED_OVER for combining marks."""
    table = np.zeros(sys.maxunicode + 1, np.uint32)
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if character.isalnum():
            folded = character.casefold()
            table[code] = ord(folded) if len(folded) == 1 else code
        elif unicodedata.category(character) in ("Mn", "Cf"):
            table[code] = _PASSED_OVER
    table[[ord("ё"), ord("Ё")]] = ord("е")
    return table
