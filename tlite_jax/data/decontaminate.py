"""Documents that repeat evaluation items: dropped, or what they repeat is cut out of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlite_jax.data.evaluation_items import EvaluationItems
from tlite_jax.data.words import HashedWords, hash_words, ngrams, normalised

Ints = npt.NDArray[np.int64]

# Of one document this many items are listed.
_LISTED = 5


@dataclass(frozen=True)
class Contamination:
    """What a document repeats.

    Attributes:
      share: of its words, those in matched n-grams.
      items: how many items' n-grams it has.
      matches: the first of them: set, file and line of the item, and the words that agree, as the document has them.
      text: the document without them; None where it is to be dropped.
    """

    share: float
    items: int
    matches: list[dict[str, str]]
    text: str | None


def decontaminate(texts: Sequence[str], items: EvaluationItems) -> dict[int, Contamination]:
    """Looks for evaluation items in texts; returns those that have some by their number."""
    texts = [normalised(text) for text in texts]
    words = hash_words(texts)
    first, length, item = _matches(words, items)
    found = {}
    for rows in np.split(np.arange(len(first)), np.flatnonzero(np.diff(words.texts[first])) + 1):
        if rows.size:
            number = int(words.texts[first[rows[0]]])
            found[number] = _contamination(texts[number], words, first[rows], length[rows], item[rows], items)
    return found


def _matches(words: HashedWords, items: EvaluationItems) -> tuple[Ints, Ints, npt.NDArray[np.uint32]]:
    """Returns the first word, number of words and item of every n-gram that is in an item, in the order of words."""
    firsts, lengths, all_items = list[Ints](), list[Ints](), list[npt.NDArray[np.uint32]]()
    for n, hashes, first in ngrams(words, items.config.ngram_words):
        if n >= items.config.min_words:
            rows, item = items.find(hashes)
            firsts.append(first[rows])
            lengths.append(np.full(len(rows), n))
            all_items.append(item)
    if not firsts:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint32)
    all_firsts, all_lengths = np.concatenate(firsts), np.concatenate(lengths)
    order = np.lexsort((all_lengths, all_firsts))
    return all_firsts[order], all_lengths[order], np.concatenate(all_items)[order]


def _contamination(
    text: str, words: HashedWords, first: Ints, length: Ints, item: npt.NDArray[np.uint32], items: EvaluationItems
) -> Contamination:
    start, end = np.searchsorted(words.texts, [words.texts[first[0]], words.texts[first[0]] + 1])
    covered = np.zeros(end - start + 1, np.int64)
    np.add.at(covered, first - start, 1)
    np.add.at(covered, first - start + length, -1)
    copied = np.cumsum(covered[:-1]) > 0
    share = float(copied.mean())
    _, rows = np.unique(item, return_index=True)
    matches = []
    for row in np.sort(rows)[:_LISTED].tolist():
        name, place = items.places[item[row]]
        last = first[row] + length[row] - 1
        matches.append({"set": name, "item": place, "words": text[words.starts[first[row]] : words.ends[last]]})
    rest = None if share > items.config.drop_above else _without(text, words, start, copied)
    return Contamination(round(share, 4), len(rows), matches, rest if rest and rest.strip() else None)


def _without(text: str, words: HashedWords, start: int, copied: npt.NDArray[np.bool_]) -> str:
    """Cuts the copied words, and what lies between them, out of a text."""
    edges = np.flatnonzero(np.diff(copied.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    kept, position = [], 0
    for begin, end in edges:
        kept.append(text[position : words.starts[start + begin]])
        position = int(words.ends[start + end - 1])
    return "".join([*kept, text[position:]])
