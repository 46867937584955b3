"""Whether an arrow has to run, and why."""

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tlite_jax.config.recipe import RecipeConfig
from tlite_jax.config_files import load_config
from tlite_jax.errors import UserError
from tlite_jax.recipe.graph import STEPS_KEY, Arrow, assembled, released
from tlite_jax.recipe.identity import Hashes, newest_step
from tlite_jax.recipe.stages import is_longer, is_same_run
from tlite_jax.recipe.state import Record, State
from tlite_jax.report.read import read_run

# skip: done. run: from nothing. again: made before, of something else or harmed since. resume: interrupted.
# adopt: done by hand. wait: something it reads is not there.
Action = Literal["skip", "run", "again", "resume", "adopt", "wait"]
ABSENT = "absent"
BY_HAND = "done by hand"


@dataclass(frozen=True)
class Decision:
    """What to do about an arrow; `inputs` as they are now."""

    action: Action
    why: str
    inputs: Mapping[str, str]
    harmed: bool = False

    @property
    def runs(self) -> bool:
        """Whether its command has to run."""
        return self.action not in ("skip", "adopt")


class Decider:
    """Compares arrows with what is on disk."""

    def __init__(self, recipe: RecipeConfig, hashes: Hashes):
        self._recipe, self._hashes = recipe, hashes

    def decide(self, arrow: Arrow, state: State, running: Sequence[str] = ()) -> Decision:
        """Decides about an arrow; `running` are those before it that would run first."""
        record = state.arrows.get(arrow.name)
        by_hand = record is None and self._done_by_hand(arrow)
        if running:
            return Decision("adopt", BY_HAND, {}) if by_hand else Decision("run", f"after {', '.join(running)}", {})
        inputs = self.inputs(arrow)
        if absent := [name for name, value in inputs.items() if value == ABSENT]:
            return Decision("wait", f"{', '.join(absent)} is absent", inputs)
        if record is None:
            return Decision("adopt", BY_HAND, inputs) if by_hand else Decision("run", "not made yet", inputs)
        if changed := _changes(record.inputs, inputs):
            longer = arrow.run is not None and is_longer(arrow.run, record.inputs, inputs)
            return Decision("resume" if longer else "again", "; ".join(changed), inputs)
        if record.state == "started":
            return Decision("resume", "interrupted", inputs)
        if harmed := self._harmed(arrow, record):
            return Decision("again", "; ".join(harmed), inputs, harmed=True)
        return Decision("skip", "done", inputs)

    def inputs(self, arrow: Arrow) -> dict[str, str]:
        """What decides its result: values of the recipe, and digests of what it reads."""
        found = dict(arrow.values)
        for read in arrow.reads:
            paths = sorted(glob.glob(read, recursive=True)) if glob.has_magic(read) else [read]
            if not paths:
                found[read] = ABSENT
            for path in paths:
                found[path] = self._hashes.of(self.located(Path(path))) or ABSENT
        return found

    def outputs(self, arrow: Arrow) -> dict[str, str]:
        """Digests of what it has made.

        Raises:
          UserError: something is not there.
        """
        found = {}
        for path in arrow.makes:
            value = self._hashes.of(self.located(path))
            if value is None:
                raise UserError(f"{arrow.name} ended well and made no {path}; see its log")
            found[str(path)] = value
        return found

    def located(self, path: Path) -> Path:
        """Where a path is now: parts of a release move when it becomes one."""
        place = assembled(self._recipe)
        if not place.exists() and (path == place or place in path.parents):
            return released(self._recipe) / path.relative_to(place)
        return path

    def _harmed(self, arrow: Arrow, record: Record) -> list[str]:
        problems = []
        for path in arrow.makes:
            now = self._hashes.of(self.located(path))
            if now is None:
                problems.append(f"{path} is gone")
            elif now != record.outputs.get(str(path)):
                problems.append(f"{path} is not as it was made")
        return problems

    def _done_by_hand(self, arrow: Arrow) -> bool:
        """A stage trained elsewhere, to its end and by the same config; the same model, imported."""
        made = arrow.makes[0]
        step = newest_step(made) if arrow.kind in ("train", "import") else None
        if step is None:
            return False
        if arrow.kind == "import":
            return step == 0 and self._recipe.base is not None and _same_source(_origin(made), self._recipe.base.source)
        assert arrow.run is not None
        file = made / "config.yaml"
        if not file.is_file() or not is_same_run(arrow.run, load_config(file)):
            return False
        return read_run(made).total_steps == step


def _origin(run: Path) -> str | None:
    """What a run was imported from, as its checkpoint says; None where that cannot be read."""
    try:
        meta = json.loads((run / "checkpoints" / "0" / "meta" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    origin = meta.get("origin") if isinstance(meta, dict) else None
    return origin if isinstance(origin, str) else None


def _same_source(origin: str | None, source: str) -> bool:
    """Whether both name one thing: a hub id, or a place on this machine however it is written."""
    return origin is not None and (origin == source or Path(origin).resolve() == Path(source).resolve())


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    lines = [f"{name} has changed" for name in now if name in before and now[name] != before[name]]
    # A recipe of an earlier version knew no steps; what it has trained is not trained again for that.
    lines += [f"{name} is new" for name in now if name not in before and not name.endswith(STEPS_KEY)]
    return lines + [f"{name} is no longer read" for name in before if name not in now]
