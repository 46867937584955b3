"""The measurement of tokenising compares the same work."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import _data_tokenize


def test_both_make_the_same_tokens() -> None:
    found = _data_tokenize.measure(megabytes=0.1, repeats=1)
    assert found["tokens_equal"]
    assert 0.1 < found["ratio"] < 10
    assert found["whole shard"]["core_mb_per_second"] > 0.05
