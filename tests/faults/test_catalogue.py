"""The catalogue in docs/reliability.md names tests that are there."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_test_of_the_catalogue_exists() -> None:
    text = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 40
    absent = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^ *def {name}\(", (REPOSITORY / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert absent == []
