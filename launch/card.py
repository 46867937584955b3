"""`python -m launch card RECIPE`: the model card of a recipe's release."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.config.recipe import RecipeConfig
    from tlite_jax.release.card import Evaluated
    from tlite_jax.report.read import RunData


def main(recipe: Annotated[Path, typer.Argument(help="The recipe, as YAML, gated.")]) -> None:
    """Write README.md of a release from its runs, evaluations and release.json; `recipe` does so by itself.

    Example: python -m launch card configs/recipes/smollm2_russian.yaml
    """
    from launch.recipe import load_recipe
    from tlite_jax.config_files import load_config
    from tlite_jax.recipe.graph import assembled, released
    from tlite_jax.release.card import CardFacts, write_card
    from tlite_jax.release.result import load
    from tlite_jax.report.read import read_run

    loaded = load_recipe(recipe)
    place = next((path for path in (assembled(loaded), released(loaded)) if path.is_dir()), None)
    if place is None:
        raise UserError(f"{loaded.output} holds no release; make it with `python -m launch recipe {recipe}`")
    stages = [read_run(load_config(stage.config, stage.overrides).output) for stage in loaded.stages]
    facts = CardFacts(
        loaded.name, loaded.card, place, load(place), stages, tuple(_evaluated(loaded)), _plots(stages, place)
    )
    print(write_card(facts))


def _plots(stages: "list[RunData]", place: Path) -> list[str]:
    """Draws loss and forgetting of each stage that has them."""
    from tlite_jax.release.card import BOARD_PLOT, LOSS_PLOT
    from tlite_jax.telemetry.board_plot import has_board, plot_board
    from tlite_jax.telemetry.plots import plot_loss

    (place / "plots").mkdir(exist_ok=True)
    drawn = []
    for run in stages:
        metrics, name = run.directory / "metrics.jsonl", run.directory.name
        if any("loss" in record for record in run.records):
            drawn.append(LOSS_PLOT.format(run=name))
            plot_loss(metrics, place / drawn[-1], name)
        if metrics.exists() and has_board(metrics):
            drawn.append(BOARD_PLOT.format(run=name))
            plot_board(metrics, place / drawn[-1], name)
    return drawn


def _evaluated(recipe: "RecipeConfig") -> "Iterator[Evaluated]":
    """Reads what the recipe's evaluations wrote."""
    for part in recipe.evaluate:
        place = recipe.output / "evaluation" / part.name
        if part.mera is not None:
            yield from _mera(_read(place / "results.json"))
        elif part.tasks is not None:
            for file in sorted(place.rglob("results*.json")):
                yield from _tasks(_read(file))
        else:
            yield from _bits(_read(place.with_suffix(".json")))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; run its evaluation again") from error


def _bits(values: Any) -> "Iterator[Evaluated]":
    from tlite_jax.release.card import Evaluated

    for name, found in values["results"].items():
        yield Evaluated(f"held-out text, {name}", "bits_per_byte", found["bits_per_byte"], None)


def _tasks(values: Any) -> "Iterator[Evaluated]":
    """lm-evaluation-harness's: metric,filter -> value, with metric_stderr,filter beside it."""
    from tlite_jax.release.card import Evaluated

    for task, found in values["results"].items():
        shots = values.get("n-shot", {}).get(task)
        for key, value in found.items():
            metric, comma, filter_ = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = found.get(f"{metric}_stderr,{filter_}")
                yield Evaluated(task, metric, value, error if isinstance(error, float) else None, shots)


def _mera(values: Any) -> "Iterator[Evaluated]":
    from tlite_jax.release.card import Evaluated

    for task, found in values["tasks"].items():
        for metric, value in (found.get("metrics") or {}).items():
            if isinstance(value, int | float):
                yield Evaluated(f"MERA {task}", metric, value, None)
