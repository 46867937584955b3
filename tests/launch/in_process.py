"""`python -m launch` in the process of a test."""

import sys
from typing import NamedTuple

import pytest

from launch import __main__ as launch_main


class Ended(NamedTuple):
    """How a call ended."""

    status: int
    out: str
    err: str


def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Ended:
    """Calls the command line with these words; what was printed before is forgotten."""
    monkeypatch.setattr(sys, "argv", ["launch", *map(str, words)])
    capsys.readouterr()
    try:
        launch_main.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    return Ended(status, *capsys.readouterr())
