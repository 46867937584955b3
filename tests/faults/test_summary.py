"""The table of `make test-faults`: what failed and what could not be tried is not taken for what passed."""

from pathlib import Path

import pytest

from tests.faults import __main__ as faults
from tests.faults import report

TELLS = "from tests.faults.report import tell; "
TELLS += "tell('near', worst=2.0, limit=10.0); tell('near', worst=4.0, limit=8.0, note='busy'); tell('far'); "
GOOD = faults.Fault("good", "nothing", 20, ("-c", TELLS + "assert '{}' == '2'"))
BAD = faults.Fault("bad", "something", 3, ("-c", "raise SystemExit(1)"))
ABSENT = faults.Fault("absent", "all of it", 3, ("-c", "raise SystemExit(1)"), lambda: "needs root")
TESTS = "import pytest\n@pytest.mark.skip('no ships')\ndef test_a(): pass\ndef test_b(): pass\ndef test_c(): pass\n"


@pytest.mark.parametrize(("chosen", "status"), [((GOOD, ABSENT), 0), ((GOOD, BAD, ABSENT), 1)])
def test_the_table_says_what_passed_failed_and_was_skipped(
    chosen: tuple[faults.Fault, ...],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(faults, "FAULTS", chosen)
    monkeypatch.setenv("TLITE_FAULTS", "0.1")
    with pytest.raises(SystemExit) as end:
        faults.main([])
    assert int(end.value.code) == status
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert rows["good"][2:4] == ["2", "passed"]
    assert rows["near"][1:] == ["2", "4.0", "8.0", "busy"]
    assert rows["far"][1:] == ["1"]
    assert rows["absent"][4:] == ["0", "skipped", "0", "needs", "root"]
    assert "bad" not in rows or rows["bad"][2:4] == ["1", "FAILED"]
    assert lines[-1].startswith(f"1 passed, {status} failed, 1 skipped in 0 minutes, at 0.1 of")


def test_tests_are_counted_and_the_reasons_of_skips_told(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    result = faults.run(faults.Fault("some", "tests", 1, (*faults.PYTEST, str(tmp_path))), 1.0)
    assert result.passed
    assert result.told == (report.Told("", 2, None, None, "1 skipped: no ships"),)
    assert "2      passed" in faults.summary([result], 1.0)
