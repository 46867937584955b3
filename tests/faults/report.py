"""What the tries of a fault tell the table of `make test-faults`: a line of JSON each, in the file that `FILE` names.

A command that is run by itself has no such file and tells nobody.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

FILE = "TLITE_FAULTS_REPORT"


class Told(NamedTuple):
    """Of tries of one kind.

    Attributes:
      kind: of the fault, "" where it has one only.
      count: how many.
      worst, limit: seconds that the one took which came nearest to its limit, and that; None: nothing is timed.
      note: what else there is to say of that one.
    """

    kind: str
    count: int
    worst: float | None
    limit: float | None
    note: str


def tell(
    kind: str = "", count: int = 1, worst: float | None = None, limit: float | None = None, note: str = ""
) -> None:
    """Tells of tries that went well."""
    if path := os.environ.get(FILE):
        with open(path, "a") as file:
            file.write(json.dumps(Told(kind, count, worst, limit, note)) + "\n")


def read(path: Path) -> list[Told]:
    """What was told in a file that may not be there, a line for each kind."""
    found: dict[str, Told] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        told = Told(*json.loads(line))
        before = found.get(told.kind, told._replace(count=0))
        nearest = max(before, told, key=_share)
        found[told.kind] = nearest._replace(count=before.count + told.count)
    return list(found.values())


def read_tests(path: Path) -> list[Told]:
    """What pytest has written (--junitxml): how many tests there were, and those that were skipped by their reasons."""
    if not path.exists():
        return []
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    skipped = [element.get("message", "") for case in cases if (element := case.find("skipped")) is not None]
    reasons = "; ".join(sorted(set(skipped)))
    return [Told("", len(cases) - len(skipped), None, None, f"{len(skipped)} skipped: {reasons}" if skipped else "")]


def _share(told: Told) -> float:
    return 0.0 if told.worst is None else told.worst / (told.limit or 1.0)
