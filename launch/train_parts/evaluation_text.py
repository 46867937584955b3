"""The part of in-loop evaluation that writes and answers: samples of text, and lm-evaluation-harness's tasks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from tlite_jax.config import RunConfig
    from tlite_jax.evaluate.language_model import LanguageModel

Sample = Callable[[Any], Mapping[str, str]]
Tasks = Callable[[int, Any], Mapping[str, float]]


def make_text_evaluation(config: "RunConfig", tokenizer: Path, mesh: "Mesh") -> tuple[Sample | None, Tasks | None]:
    """What a config asks for: parameters -> continuations, and (step, parameters) -> scores; None for what it does not.

    Raises:
      UserError: no tokenizer there, an unknown task, or a task's data that is not here.
    """
    if not config.evaluation.samples and config.evaluation.tasks is None:
        return None, None
    from launch.language_model import load_tokenizer
    from tlite_jax.evaluate.language_model import LanguageModel

    assert config.model is not None
    model = LanguageModel(None, config.model, mesh, load_tokenizer(tokenizer), dtype=config.execution.compute_dtype)
    sample = _sampler(config, model) if config.evaluation.samples else None
    return sample, None if config.evaluation.tasks is None else _task_runner(config, model)


def _sampler(config: "RunConfig", model: "LanguageModel") -> Sample:
    prompts = [model.encode(prompt) for prompt in config.evaluation.samples]

    def sample(params: Any) -> Mapping[str, str]:
        model.params = params
        try:
            written = model.write(prompts, max_new_tokens=config.evaluation.sample_tokens)
        finally:
            model.params = None  # the next step reuses their memory
        return {prompt: part.text for prompt, part in zip(config.evaluation.samples, written, strict=True)}

    return sample


def _task_runner(config: "RunConfig", model: "LanguageModel") -> Tasks:
    from tlite_jax.errors import require

    require("lm_eval", extra="eval", purpose="evaluation.tasks")
    from tlite_jax.evaluate.harness import HarnessModel
    from tlite_jax.evaluate.harness_run import HarnessOptions, open_tasks, run_tasks

    asked = config.evaluation.tasks
    assert asked is not None
    every = asked.every or config.evaluation.every
    assert every is not None
    options = HarnessOptions(
        asked.names, num_fewshot=asked.num_fewshot, limit=asked.limit, include_path=asked.include_path
    )
    opened = [open_tasks(options)]  # refuses what is missing now; good for one run

    def tasks(step: int, params: Any) -> Mapping[str, float]:
        if step % every:
            return {}
        model.params = params
        try:
            found = run_tasks(
                HarnessModel(model), options, name=str(config.output), tasks=opened.pop() if opened else None
            )
        finally:
            model.params = None
        return scores_of(found["results"])

    return tasks


def scores_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The harness's results as "tasks/NAME/METRIC" -> value, standard errors left out."""
    scores = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, int | float) and filtered and not metric.endswith("_stderr"):
                name = metric if filtered == "none" else f"{metric},{filtered}"
                scores[f"tasks/{task}/{name}"] = float(value)
    return scores
