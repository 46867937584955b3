"""release.json: what is written is read back, and what is none is refused."""

from pathlib import Path

import pytest

from tests.release.made_result import made_result as result
from tlite_jax.errors import UserError
from tlite_jax.release.result import Check, load, save


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = result(Check(name="hf logits", status="passed", bound="a", value="1e-6", seconds=0.5, details=("да",)))
    assert load(save(written, tmp_path)) == load(tmp_path) == written
    assert written.named("hf logits") == written.checks[0]
    assert [path.name for path in tmp_path.iterdir()] == ["release.json"]


def test_what_was_not_run_holds_a_release_up_unless_allowed() -> None:
    def check(status: str, allowed: bool) -> Check:
        return Check.model_validate(
            {"name": "x", "status": status, "bound": "", "value": "", "seconds": 0.0, "allowed": allowed}
        )

    assert [check(*case).holds_up for case in (("passed", False), ("failed", True), ("not run", False))] == [
        False,
        True,
        True,
    ]
    assert not check("not run", True).holds_up


def test_what_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="python -m launch gate"):
        load(tmp_path)
    (tmp_path / "release.json").write_text("[]")
    with pytest.raises(UserError, match=r"not a release\.json"):
        load(tmp_path)
    (tmp_path / "release.json").write_text('{"passed": 1}')
    with pytest.raises(UserError, match="passed"):
        load(tmp_path)
