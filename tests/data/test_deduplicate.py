"""Duplicates are found, the preferred document stays, and nothing else goes."""

import tracemalloc
from collections import Counter

import datasketch
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from written_texts import ENGLISH, RUSSIAN, make_texts

from tlite_jax.config import NearDuplicatesConfig
from tlite_jax.data.exact_duplicates import exact_duplicates
from tlite_jax.data.near_duplicates import Signer, _agreements, banding, near_duplicates

CONFIG = NearDuplicatesConfig(threshold=0.7, num_permutations=128, ngram_words=3)


def removed(
    texts: list[str], config: NearDuplicatesConfig = CONFIG, preferred: list[int] | None = None
) -> dict[int, tuple[int, float]]:
    """Removed document -> (kept one, similarity)."""
    signer = Signer(config)
    signatures = np.stack([signer.sign(text) for text in texts])
    bands = signer.bands(signatures)
    first = np.isin(np.arange(len(texts)), preferred or [])
    found = near_duplicates(
        lambda band: bands[:, band],
        lambda document: signatures[document],
        np.ones(len(texts), bool),
        first,
        config,
    )
    pairs = zip(found.kept.tolist(), found.similarity.tolist(), strict=True)
    return dict(zip(found.removed.tolist(), pairs, strict=True))


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40))
def test_the_preferred_of_equal_documents_stays(documents: list[tuple[int, bool]]) -> None:
    hashes = np.array([[content % 3, content // 3] for content, _ in documents], np.uint64)
    kept = exact_duplicates(hashes, np.array([preferred for _, preferred in documents]))
    order = sorted(range(len(documents)), key=lambda number: (not documents[number][1], number))
    for document, (content, _) in enumerate(documents):
        assert kept[document] == next(other for other in order if documents[other][0] == content)


def test_no_documents() -> None:
    assert exact_duplicates(np.empty((0, 2), np.uint64), np.empty(0, bool)).size == 0
    nothing = np.empty(0, bool)
    found = near_duplicates(lambda _: np.empty(0, np.uint64), lambda _: np.empty(0), nothing, nothing, CONFIG)
    assert found.removed.size == 0


def test_memory_is_some_bytes_a_document() -> None:
    """300 million documents should fit a node: 40 bytes each are 12 GB."""
    count = 400_000
    hashes = np.random.default_rng(0).integers(0, count, (count, 2)).astype(np.uint64)
    hashes[:, 1] = 0  # two documents of three share their hash with another
    preferred = np.zeros(count, bool)
    tracemalloc.start()
    exact_duplicates(hashes, preferred)
    exact_peak = tracemalloc.get_traced_memory()[1] / count
    tracemalloc.reset_peak()
    bands = [np.random.default_rng(band).permutation(np.arange(count) // 2).astype(np.uint64) for band in range(3)]
    before = tracemalloc.get_traced_memory()[0]
    places, groups = _agreements(lambda band: bands[band], np.arange(count), 3)
    agreements_peak = (tracemalloc.get_traced_memory()[1] - before) / count
    tracemalloc.stop()
    assert len(places) == len(groups) == 3 * count, "each document agrees with one other in each band"
    assert exact_peak < 100
    assert agreements_peak < 120


def test_the_search_equals_an_index_of_kept_documents() -> None:
    """Datasketch's own index, asked document by document, removes the same ones for the same reasons."""
    random = np.random.default_rng(3)
    words = [f"w{number}" for number in range(60)]
    texts = []
    for _ in range(40):
        base = random.choice(words, 50).tolist()
        for _ in range(6):
            changed = list(base)
            for place in random.integers(0, 50, random.integers(0, 9)):
                changed[place] = str(random.choice(words))
            texts.append(" ".join(changed))
    config = NearDuplicatesConfig(threshold=0.6, num_permutations=64, ngram_words=1)
    signer, index = Signer(config), datasketch.MinHashLSH(threshold=0.6, num_perm=64)
    signatures = [signer.sign(text) for text in texts]
    expected: dict[int, tuple[int, float]] = {}
    for document, signature in enumerate(signatures):
        lean = datasketch.LeanMinHash(seed=1, hashvalues=signature, scheme="affine32")
        similar = [(float(np.mean(signatures[other] == signature)), -other) for other in index.query(lean)]
        similarity, kept = max(similar, default=(0.0, 0))
        if similarity >= 0.6:
            expected[document] = (-kept, similarity)
        else:
            index.insert(document, lean)
    assert len(expected) > 50
    assert removed(texts, config) == expected


def test_boilerplate_that_all_documents_share_costs_little() -> None:
    """Signatures equal in one band and different elsewhere: no pair is similar, and few are compared."""
    count, (num_bands, rows) = 3000, banding(CONFIG)
    signatures = np.random.default_rng(0).integers(0, 2**32, (count, 128)).astype(np.uint32)
    signatures[:, :rows] = 7
    bands = Signer(CONFIG).bands(signatures)
    assert len(np.unique(bands[:, 0])) == 1
    assert bands.shape == (count, num_bands)
    asked = Counter[int]()

    def signature(document: int) -> np.ndarray:
        asked[document] += 1
        return signatures[document]

    everything = np.ones(count, bool)
    found = near_duplicates(lambda band: bands[:, band], signature, everything, ~everything, CONFIG)
    assert found.removed.size == 0
    assert asked.total() < 66 * count


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
    assert list(removed(texts, preferred=[1])) == [0]


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
