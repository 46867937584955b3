"""The table of `make test-faults`: what failed and what could not be tried is not taken for what passed."""

import pytest

from tests.faults import __main__ as faults

GOOD = faults.Fault("good", "nothing", 20, ("-c", "assert '{}' == '2'"))
BAD = faults.Fault("bad", "something", 3, ("-c", "raise SystemExit(1)"))
ABSENT = faults.Fault("absent", "what needs root", 3, ("-c", "raise SystemExit(1)"), lambda: "needs root")


@pytest.mark.parametrize(("chosen", "status"), [((GOOD, ABSENT), 0), ((GOOD, BAD, ABSENT), 1)])
def test_the_table_says_what_passed_failed_and_was_skipped(
    chosen: tuple[faults.Fault, ...],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(faults, "FAULTS", chosen)
    monkeypatch.setenv("TLITE_FAULTS", "0.1")
    with pytest.raises(SystemExit) as end:
        faults.main([])
    assert int(end.value.code) == status
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[-len(chosen) - 1 : -1]}
    assert rows["good"][2:4] == ["2", "passed"]
    assert rows["absent"][-5:] == ["0", "skipped", "0", "needs", "root"]
    assert "bad" not in rows or rows["bad"][2:4] == ["1", "FAILED"]
    assert lines[-1].startswith(f"1 passed, {status} failed, 1 skipped in 0 minutes, at 0.1 of")
