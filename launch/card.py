"""`python -m launch card RECIPE`: the model card of a recipe's release."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.config.recipe import RecipeConfig
    from tlite_jax.release.evaluated import Evaluation
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
    facts = CardFacts(loaded.name, loaded.card, place, load(place), stages, _evaluated(loaded), _plots(stages, place))
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


def _evaluated(recipe: "RecipeConfig") -> "Evaluation":
    """Reads what the recipe's evaluations wrote."""
    from tlite_jax.release.evaluated import from_bits, from_harness, from_mera, joined

    parts = []
    for part in recipe.evaluate:
        place = recipe.output / "evaluation" / part.name
        if part.mera is not None:
            parts.append(_read(place / "results.json", from_mera))
        elif part.tasks is not None:
            parts += [_read(file, from_harness) for file in sorted(place.rglob("results*.json")) or [place]]
        else:
            parts.append(_read(place.with_suffix(".json"), from_bits))
    return joined(parts)


def _read(path: Path, understand: "Callable[[Any], Evaluation]") -> "Evaluation":
    try:
        return understand(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; run its evaluation again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no results that `eval` writes ({error!r}); run its evaluation again") from error
