"""Five hundred spoiled files; `make test-fuzz` runs 20,000."""

from pathlib import Path

from tests.bridge import fuzzing


def test_spoiled_files_are_refused_or_read_right(tmp_path: Path) -> None:
    fuzzing.fuzz(20, 0, tmp_path / "warm")
    before = fuzzing.peak_bytes()
    outcomes = fuzzing.fuzz(500, 20240717, tmp_path / "fuzz")
    assert fuzzing.peak_bytes() - before < fuzzing.MOST_BYTES
    total: dict[str, int] = {}
    for counts in outcomes.values():
        for outcome, count in counts.items():
            total[outcome] = total.get(outcome, 0) + count
    assert sum(total.values()) == 500
    assert total["refused"] > 200
    assert total["read, data changed"] > 10
