"""`recipe.json`: what each arrow was last made from, and what it made."""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from tlite_jax.config import Section
from tlite_jax.config_files import parse
from tlite_jax.errors import UserError
from tlite_jax.recipe.identity import write_json


class Record(Section):
    """An arrow's last start.

    Attributes:
      state: "started" while it runs, and after it was interrupted.
      inputs: what is read -> digest, or the value itself.
      outputs: path -> digest; empty while it runs.
      seconds: it took, in this start.
      adopted: it was done by hand, and found done.
    """

    state: Literal["started", "done"]
    inputs: dict[str, str]
    outputs: dict[str, str] = Field(default={})
    seconds: float = 0.0
    adopted: bool = False


class State(Section):
    """All of it."""

    format_version: Literal[1] = 1
    arrows: dict[str, Record] = Field(default={})


def load_state(path: Path) -> State:
    """Reads recipe.json; an empty one where there is none.

    Raises:
      UserError: the file is damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return State()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it, and finished stages are found again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no recipe's state; remove it, and finished stages are found again")
    return parse(State, values, str(path))


def save_record(path: Path, state: State, name: str, record: Record) -> State:
    """Writes the state with an arrow's record in it; returns that state."""
    changed = state.model_copy(update={"arrows": {**state.arrows, name: record}})
    write_json(path, changed.model_dump(mode="json"))
    return changed
