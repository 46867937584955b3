"""Duplicates are found, the preferred document stays, and nothing else goes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from written_texts import ENGLISH, RUSSIAN, make_texts

from tlite_jax.config import NearDuplicatesConfig
from tlite_jax.data.deduplicate import Signer, exact_duplicates, near_duplicates

CONFIG = NearDuplicatesConfig(threshold=0.7, num_permutations=128, ngram_words=3)


def removed(texts: list[str], config: NearDuplicatesConfig = CONFIG, order: list[int] | None = None):
    signer = Signer(config)
    signatures = [signer.sign(text) for text in texts]
    return near_duplicates(lambda number: signatures[number], order or range(len(texts)), config)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_the_preferred_of_equal_documents_stays(contents: list[int], random) -> None:
    order = list(range(len(contents)))
    random.shuffle(order)
    hashes = np.array([[content % 3, content // 3] for content in contents], np.uint64)
    kept = exact_duplicates(hashes, np.array(order))
    for document, content in enumerate(contents):
        assert kept[document] == next(other for other in order if contents[other] == content)


def test_no_documents() -> None:
    assert exact_duplicates(np.empty((0, 2), np.uint64), np.empty(0, np.int64)).size == 0


def test_small_changes_are_found_and_different_documents_are_not() -> None:
    texts = [" ".join(RUSSIAN), " ".join(ENGLISH), *make_texts(RUSSIAN, 30, 5, longest=3)]
    changed = texts[0].replace("густой туман", "редкий туман").upper() + " Конец!"
    found = removed([*texts, changed, "Совсем новый документ о другом предмете, написанный иначе."])
    assert found.keys() & {0, 1, len(texts) + 1} == set()
    kept, similarity = found[len(texts)]
    assert kept == 0
    assert similarity >= 0.7


def test_the_first_in_order_stays() -> None:
    texts = [" ".join(RUSSIAN), " ".join(RUSSIAN) + " Ещё слово."]
    assert list(removed(texts)) == [1]
    assert list(removed(texts, order=[1, 0])) == [0]


def test_the_estimate_is_close_to_the_true_similarity() -> None:
    words = [f"слово{i}" for i in range(400)]
    config = NearDuplicatesConfig(threshold=0.5, num_permutations=256, ngram_words=1)
    texts = [" ".join(words[:300]), " ".join(words[100:])]  # 200 of 400 in common
    signer = Signer(config)
    assert abs(np.mean(signer.sign(texts[0]) == signer.sign(texts[1])) - 0.5) < 0.12
    assert removed(texts, NearDuplicatesConfig(threshold=0.8, num_permutations=256, ngram_words=1)) == {}


def test_texts_without_words_and_long_ones_have_signatures() -> None:
    signer = Signer(CONFIG)
    assert not np.array_equal(signer.sign("!!!"), signer.sign("???"))
    words = " ".join(f"w{i}" for i in range(40_000))
    assert np.array_equal(signer.sign(words), signer.sign(words))
