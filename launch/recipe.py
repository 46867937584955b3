"""`python -m launch recipe RECIPE`: from raw text to a gated release."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.recipe_parts.process import Runner, locked
from tlite_jax.config.recipe import RecipeConfig
from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.recipe.decide import Decision
    from tlite_jax.recipe.graph import Arrow

EXIT_PREEMPTED, EXIT_INTERRUPTED = 75, 130
_RELEASING = ("export", "gate", "card")


def main(
    recipe: Annotated[Path, typer.Argument(help="The recipe, as YAML.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the graph, what would run, and why.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the outcome as JSON; other lines go to stderr.")
    ] = False,
    from_: Annotated[str | None, typer.Option("--from", help="Run this step and all behind it, done or not.")] = None,
    only: Annotated[str | None, typer.Option(help="Run no step but this one.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file again instead of trusting its size and time of change.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="ORG/NAME: upload the release, once the gate has passed.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Of a hub repository that is made for it.")] = False,
) -> None:
    """Prepare, train, evaluate, export, check and describe a model; what is done already is skipped.

    Interrupted, the same command goes on. Ends with 0 when the release is there, 1 when a step or the gate fails,
    2 for bad usage, 75 when stopped by SIGTERM (start me again), 76 when training's watchdog ended it.

    Example: python -m launch recipe configs/recipes/smollm2_russian.yaml --dry-run
    """
    from tlite_jax.recipe.graph import build, released

    loaded = load_recipe(recipe)
    arrows = build(loaded, recipe)
    for option, name in {"--from": from_, "--only": only}.items():
        if name is not None and name not in (names := [arrow.name for arrow in arrows]):
            raise UserError(f"{option} {name}: no such step; choose from {', '.join(names)}")
    if from_ is not None and only is not None:
        raise UserError("--from and --only are two choices: give one of them")
    _refuse_push(push_to_hub, private=private, only=only)
    if dry_run:
        _dry_run(loaded, arrows, as_json=as_json, from_=from_, only=only, verify=verify)
        if push_to_hub is not None and not as_json:
            print(f"push: python -m launch push {released(loaded)} {push_to_hub}{' --private' if private else ''}")
        return
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        raise UserError(
            "recipe is one process, and srun starts several; train stages with `submit`, then start it alone"
        )
    with locked(loaded.output / "recipe.lock") as lock:
        runner = Runner(lock, sys.stderr if as_json else sys.stdout)
        with runner.forwarding():
            outcome = Work(loaded, arrows, runner, fresh=verify).go(from_, only)
    if push_to_hub is not None and outcome["release"] is not None:
        from launch.push import push

        outcome["url"] = push(Path(outcome["release"]), push_to_hub, private=private)
        runner.say(f"push: {outcome['url']}")
    if as_json:
        print(json.dumps(outcome, ensure_ascii=False, indent=1))


def _refuse_push(repository: str | None, *, private: bool, only: str | None) -> None:
    """Before anything runs: hours may lie between the start and the upload."""
    if repository is None:
        if private:
            raise UserError("--private is of the repository that --push-to-hub ORG/NAME makes; give that too")
        return
    if only is not None:
        raise UserError("--push-to-hub uploads a whole release: leave out --only")
    from launch.push import refuse_destination

    refuse_destination(repository)


def load_recipe(path: Path) -> RecipeConfig:
    """Reads a recipe.

    Raises:
      UserError: missing or malformed file, unknown key, wrong type or value.
    """
    from tlite_jax.config_files import parse, read_yaml

    try:
        values = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this is {type(values).__name__}")
    return parse(RecipeConfig, values, str(path))


class Work:
    """A recipe being carried out."""

    def __init__(self, recipe: RecipeConfig, arrows: Sequence["Arrow"], runner: Runner, *, fresh: bool):
        from tlite_jax.recipe.decide import Decider
        from tlite_jax.recipe.identity import Hashes
        from tlite_jax.recipe.state import load_state

        self._recipe, self._arrows, self._runner = recipe, arrows, runner
        self._hashes = Hashes(recipe.output / "hashes.json", fresh=fresh)
        self._decider = Decider(recipe, self._hashes)
        self._file = recipe.output / "recipe.json"
        self._state = load_state(self._file)

    def go(self, from_: str | None, only: str | None) -> dict[str, Any]:
        """Runs what has to run; returns what was done, for --json.

        Raises:
          typer.Exit: a command failed, or a signal came.
        """
        from tlite_jax.recipe.graph import assembled, released

        steps, forced = {}, False
        for arrow in self._arrows:
            forced = forced or arrow.name == from_
            if only is not None and arrow.name != only:
                continue
            decision = _forced(self._decider.decide(arrow, self._state), arrow.name, from_=forced, only=only)
            self._say(f"{arrow.name}: {_told(decision)}")
            self._do(arrow, decision)
            steps[arrow.name] = {"action": decision.action, "why": decision.why}
            self._hashes.save()
        place = released(self._recipe)
        if only is None:
            self._release()
            self._say(f"{place}: released")
        elif not place.exists() and assembled(self._recipe).exists():
            self._say(f"{assembled(self._recipe)}: not released yet; the recipe without --only does that")
        return {"steps": steps, "release": str(place) if place.exists() else None}

    def _do(self, arrow: "Arrow", decision: "Decision") -> None:
        from tlite_jax.recipe.state import Record, save_record

        if decision.action == "wait":
            raise UserError(f"{arrow.name}: {decision.why}; make it first, by an earlier step or by hand")
        if decision.action == "skip":
            return
        seconds = 0.0
        inputs = dict(decision.inputs)
        if decision.runs:
            words = self._clear(arrow, decision)
            started = Record(state="started", inputs=inputs)
            self._state = save_record(self._file, self._state, arrow.name, started)
            began = time.monotonic()
            status = self._runner.run(words, self._recipe.output / "logs" / f"{arrow.name}.log", arrow.stdout)
            seconds = round(time.monotonic() - began, 3)
            self._leave_after(arrow, status)
        record = Record(
            state="done",
            inputs=inputs,
            outputs=self._decider.outputs(arrow),
            seconds=seconds,
            adopted=decision.action == "adopt",
        )
        self._state = save_record(self._file, self._state, arrow.name, record)

    def _leave_after(self, arrow: "Arrow", status: int) -> None:
        if self._runner.signal is not None:
            stopped = EXIT_INTERRUPTED if self._runner.signal == signal.SIGINT else EXIT_PREEMPTED
            self._say(f"{arrow.name}: stopped by {signal.Signals(self._runner.signal).name}; run again to go on")
            raise typer.Exit(stopped)
        if status != 0:
            self._say(f"{arrow.name}: ended with {status}; {self._recipe.output}/logs/{arrow.name}.log tells why")
            raise typer.Exit(status)

    def _clear(self, arrow: "Arrow", decision: "Decision") -> tuple[str, ...]:
        """Makes room for a command; returns its words. Nothing that was trained or imported is deleted."""
        if arrow.kind in _RELEASING:
            self._open_release()
        if arrow.kind == "train":
            return self._clear_run(arrow, decision)
        if arrow.kind == "prepare":
            return (*arrow.command, "--force") if decision.action == "again" else arrow.command
        if arrow.kind == "import" and decision.action != "resume":
            if decision.action == "run" and arrow.makes[0].exists():
                raise UserError(f"{arrow.makes[0]} exists and is not {arrow.command[1]}, imported; move it away")
            _set_aside(arrow.makes[0])
        elif not arrow.resumes or decision.action == "again":
            for path in arrow.makes if arrow.kind != "fetch" else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return arrow.command

    def _clear_run(self, arrow: "Arrow", decision: "Decision") -> tuple[str, ...]:
        """A run of other data or settings is set aside; of a harmed one only the newest checkpoint."""
        from tlite_jax.recipe.identity import newest_step

        step = newest_step(arrow.makes[0])
        if decision.harmed and step is not None:
            _set_aside(arrow.makes[0] / "checkpoints" / str(step), arrow.makes[0])
        elif decision.action == "again":
            _set_aside(arrow.makes[0])
        return arrow.command

    def _open_release(self) -> None:
        """A release that something of is made again is none, until the gate has passed again."""
        from tlite_jax.recipe.graph import assembled, released

        if not assembled(self._recipe).exists() and released(self._recipe).exists():
            self._rename(released(self._recipe), assembled(self._recipe))
        assembled(self._recipe).mkdir(parents=True, exist_ok=True)

    def _release(self) -> None:
        from tlite_jax.recipe.graph import assembled, released
        from tlite_jax.release.result import load

        place = assembled(self._recipe)
        if not place.exists():
            return
        if not load(place).passed:
            self._say(f"{place}/release.json: the gate has not passed")
            raise typer.Exit(1)
        if released(self._recipe).exists():
            _set_aside(released(self._recipe))
        self._rename(place, released(self._recipe))

    def _rename(self, before: Path, now: Path) -> None:
        before.rename(now)
        self._hashes.moved(before, now)
        self._hashes.save()

    def _say(self, line: str) -> None:
        self._runner.say(line)


def _forced(decision: "Decision", name: str, *, from_: bool, only: str | None) -> "Decision":
    """What is done runs again where that was asked for; what was done by hand, only by --from."""
    from dataclasses import replace

    if (from_ and decision.action in ("skip", "adopt")) or (name == only and decision.action == "skip"):
        return replace(decision, action="again", why="asked for")
    return decision


def _told(decision: "Decision") -> str:
    words = {"skip": "done", "adopt": "taken as done", "resume": "goes on", "wait": "cannot run", "again": "runs again"}
    return f"{words.get(decision.action, 'runs')}: {decision.why}" if decision.action != "skip" else "done"


def _set_aside(path: Path, beside: Path | None = None) -> None:
    """Renames to NAME.before-TIME (a checkpoint: beside its run)."""
    if not path.exists():
        return
    stamp = time.strftime("%Y%m%dT%H%M%S")
    name = path.name if beside is None else f"{beside.name}.checkpoint-{path.name}"
    target = (beside or path).with_name(f"{name}.before-{stamp}")
    number = 0
    while target.exists():
        number += 1
        target = target.with_name(f"{name}.before-{stamp}-{number}")
    path.rename(target)


def _dry_run(
    recipe: RecipeConfig, arrows: Sequence["Arrow"], *, as_json: bool, from_: str | None, only: str | None, verify: bool
) -> None:
    from tlite_jax.recipe.decide import Decider
    from tlite_jax.recipe.graph import edges
    from tlite_jax.recipe.identity import Hashes
    from tlite_jax.recipe.state import load_state

    decider = Decider(recipe, Hashes(recipe.output / "hashes.json", fresh=verify))
    state, behind = load_state(recipe.output / "recipe.json"), edges(arrows)
    decisions: dict[str, Decision] = {}
    forced = False
    for arrow in arrows:
        forced = forced or arrow.name == from_
        if only is not None and arrow.name != only:
            continue
        running = [
            name for name in behind[arrow.name] if name in decisions and decisions[name].action not in ("skip", "adopt")
        ]
        decisions[arrow.name] = _forced(decider.decide(arrow, state, running), arrow.name, from_=forced, only=only)
    if as_json:
        print(json.dumps([_as_json(arrow, behind, decisions) for arrow in arrows if arrow.name in decisions], indent=1))
        return
    for arrow in arrows:
        if arrow.name in decisions:
            after = f"  <- {', '.join(behind[arrow.name])}" if behind[arrow.name] else ""
            print(f"{arrow.name}: {_told(decisions[arrow.name])}{after}")
            print(f"    python -m launch {' '.join(arrow.command)}")
            print(f"    makes {', '.join(map(str, arrow.makes))}")


def _as_json(arrow: "Arrow", behind: Any, decisions: "dict[str, Decision]") -> dict[str, Any]:
    decision = decisions[arrow.name]
    return {
        "step": arrow.name,
        "after": behind[arrow.name],
        "action": decision.action,
        "why": decision.why,
        "command": ["python", "-m", "launch", *arrow.command],
        "makes": [str(path) for path in arrow.makes],
    }
