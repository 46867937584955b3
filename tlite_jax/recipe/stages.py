"""Stages beside runs on disk: is that run this stage, and can it be gone on with when the stage becomes longer."""

from collections.abc import Mapping

from tlite_jax.config import RunConfig
from tlite_jax.recipe.graph import STEPS_KEY, run_directory
from tlite_jax.recipe.identity import newest_step


def is_same_run(asked: RunConfig, recorded: RunConfig) -> bool:
    """Whether a run's config is what a stage asks for, where training has filled in what was left open.

    Args:
      asked: of the stage.
      recorded: config.yaml of the run: with the model, the step of the source and the length of a cosine.
    """
    if asked.init_from is not None and recorded.init_from is not None and asked.init_from.step is None:
        newest = newest_step(run_directory(asked.init_from.path))
        asked = asked.model_copy(update={"init_from": asked.init_from.model_copy(update={"step": newest})})
    if asked.model is None:
        asked = asked.model_copy(update={"model": recorded.model})
    if asked.schedule.total_steps is None:
        schedule = asked.schedule.model_copy(update={"total_steps": recorded.schedule.total_steps})
        asked = asked.model_copy(update={"schedule": schedule})
    return asked.semantic() == recorded.semantic() and asked.train.steps == recorded.train.steps


def is_longer(run: RunConfig, before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Whether all that has changed of a stage is that it has more steps, under a schedule that does not depend on them.

    Args:
      run: the stage, as it is now.
      before, now: inputs of its arrow, then and now.
    """
    key = next((name for name in now if name.endswith(STEPS_KEY)), "")
    old, new = before.get(key, ""), now.get(key, "")
    if not (old.isdecimal() and new.isdecimal() and int(new) > int(old)):
        return False
    fixed = run.schedule.name == "constant_with_warmup" or run.schedule.total_steps is not None
    return fixed and {**before, key: new} == dict(now)
