"""What the doctor says of one thing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tlite_jax.errors import UserError

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
      name: what.
      status: ok; warn: a run would work, worse than it should; fail: it would not work.
      message: what was found, with units.
      mend: what to do; empty where nothing is to be done.
    """

    name: str
    status: Status
    message: str
    mend: str = ""


def ok(name: str, message: str) -> Finding:
    """Nothing to mend."""
    return Finding(name, "ok", message)


def refused(name: str, error: UserError, status: Status = "fail") -> Finding:
    """What a run would be refused with; the end of such a line is its mend."""
    message, _, mend = str(error).rpartition("; ")
    if not message:
        message, _, mend = str(error).rpartition(": ")
    return Finding(name, status, message or str(error), mend)


def unless_refused(name: str, look: Callable[[], str]) -> Finding:
    """Fine, and in which words, unless looking raises UserError."""
    try:
        return ok(name, look())
    except UserError as error:
        return refused(name, error)
