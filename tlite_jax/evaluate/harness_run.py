"""Running lm-evaluation-harness's tasks on a model: its task names, few-shot rules, results and files.

Needs the extra `eval`.
"""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from tlite_jax.errors import UserError, require
from tlite_jax.evaluate.harness import HarnessModel

lm_eval = require("lm_eval", extra="eval", purpose="lm-evaluation-harness")

from lm_eval.loggers import EvaluationTracker  # noqa: E402  (found by the line above)
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import make_table  # noqa: E402

_LOCAL_DATA = (
    "to use a local copy, write a task YAML with `dataset_path: json` and `dataset_kwargs: {data_files: ...}` and give "
    "its directory as --include-path; or fill the Hugging Face cache (HF_HOME) where there is a network"
)


@dataclass(frozen=True)
class HarnessOptions:
    """What to run, in the harness's own terms.

    Attributes:
      tasks: names of tasks, groups or tags, patterns like mmlu_*, or task YAML files.
      num_fewshot: examples before a question; None: each task's own.
      limit: documents of each task, or a share of them when below 1; None: all.
      include_path: directory of task YAML files.
      output: directory for the harness's results and samples; None: none.
      log_samples: write every document with its answers.
      apply_chat_template: write prompts as a conversation.
      fewshot_as_multiturn: examples as turns of it.
      system_instruction: before everything.
      gen_kwargs: over each task's own generation_kwargs, "name=value,...".
      seed: of few-shot choice and of draws; None: the harness's own.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: float | None = None
    include_path: Path | None = None
    output: Path | None = None
    log_samples: bool = False
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    gen_kwargs: str | None = None
    seed: int | None = None


def open_tasks(options: HarnessOptions) -> "Tasks":
    """Finds tasks and reads their data, before a model is.

    Raises:
      UserError: an unknown task, a task's data that is not here, an output that cannot be written.
    """
    if options.log_samples and options.output is None:
        raise UserError("samples are written into a directory: give --output, or leave --log-samples out")
    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to --output {options.output}: {error.strerror}") from error
    tasks = _find_tasks(options)
    tasks.manager.load(list(tasks.names))
    return tasks


def run_tasks(
    model: HarnessModel, options: HarnessOptions, *, name: str, tasks: "Tasks | None" = None
) -> dict[str, Any]:
    """Evaluates a model and writes what was asked for.

    Args:
      model: from a LanguageModel.
      options: what to run.
      name: of the model, in results and their directory.
      tasks: from `open_tasks` with these options, for one run; None: they are opened here.

    Returns:
      The harness's results; `num_truncated` is added to their `config`: requests and prompts that lost their beginning
      because they exceed the model's context.

    Raises:
      UserError: an unknown task, a task's data that is not here, a chat template that is missing.
      FloatingPointError: numbers that are not finite; names the request.
    """
    if options.apply_chat_template and not model.tokenizer.chat_template:
        model.apply_chat_template([])  # says what to do
    tasks = tasks or open_tasks(options)
    tracker = EvaluationTracker(output_path=None if options.output is None else str(options.output))
    seeds = (
        {} if options.seed is None else {f"{what}_random_seed": options.seed for what in ("numpy", "torch", "fewshot")}
    )
    if options.seed is not None:
        seeds["random_seed"] = options.seed
    before = model.model.scorer.num_truncated, model.model.num_truncated_prompts
    results = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": name},
        tasks=list(tasks.names),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        log_samples=options.log_samples,
        evaluation_tracker=tracker,
        system_instruction=options.system_instruction,
        apply_chat_template=options.apply_chat_template,
        fewshot_as_multiturn=options.fewshot_as_multiturn and options.apply_chat_template,
        gen_kwargs=options.gen_kwargs,
        task_manager=tasks.manager,
        **seeds,
    )
    assert results is not None  # we are rank 0 everywhere
    results["config"]["num_truncated"] = {
        "requests": model.model.scorer.num_truncated - before[0],
        "prompts": model.model.num_truncated_prompts - before[1],
    }
    if options.output is not None and jax.process_index() == 0:
        _save(tracker, results, options.output)
    return results


def _save(tracker: EvaluationTracker, results: dict[str, Any], output: Path) -> None:
    """Writes results, and samples if there are any, as the harness does; it does not say when it cannot."""
    samples = results.pop("samples", None)
    before = set(output.rglob("results_*.json"))
    tracker.save_results_aggregated(results=results, samples=samples)
    if not set(output.rglob("results_*.json")) - before:
        raise UserError(f"cannot write results to {output}")
    for task in samples or {}:
        tracker.save_results_samples(task_name=task, samples=samples[task])


def tables(results: dict[str, Any]) -> str:
    """The harness's own tables of results, and of groups where there are any."""
    parts = [make_table(results)]
    if results.get("groups"):
        parts.append(make_table(results, "groups"))
    return "\n".join(parts)


class _Manager(TaskManager):
    """Says in one line which task's data is missing; what it loaded last it gives out once more."""

    _loaded: Any = None

    def load(self, task_list: Any) -> Any:
        """Tasks and groups, with their data."""
        (names, loaded), self._loaded = self._loaded or (None, None), None
        if names == task_list:
            return loaded
        loaded = self._load(task_list)
        self._loaded = task_list, loaded
        return loaded

    def _load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except Exception as error:  # of datasets, of the hub, of a task's own code
            raise _explained(self, task_list, error) from error


def _explained(manager: TaskManager, names: Sequence[str], error: Exception) -> Exception:
    """The error that a user is to read, for the first task that does not load."""
    for name in names:
        try:
            TaskManager.load(manager, [name])
        except Exception as own:
            line = (str(own).strip().splitlines() or [type(own).__name__])[0]
            missing = isinstance(own, OSError) or "datasets" in type(own).__module__ or "cache" in line
            if missing:
                return UserError(f"task {name}: its data is not here: {line.rstrip('.')}; {_LOCAL_DATA}")
            return UserError(f"task {name} does not load: {type(own).__name__}: {line}")
    if isinstance(error, ValueError) and str(error).startswith("Duplicate"):
        return UserError(f"{str(error).splitlines()[0].rstrip('.')}; name a task once, alone or by its group")
    return error


@dataclass(frozen=True)
class Tasks:
    """The harness's manager that knows some tasks, and their names, patterns resolved."""

    manager: TaskManager
    names: tuple[str, ...]


def _find_tasks(options: HarnessOptions) -> Tasks:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not options.tasks:
        raise UserError("--tasks is empty; name a task, for example arc_easy")
    include = None
    if options.include_path is not None:
        if not options.include_path.is_dir():
            raise UserError(f"--include-path {options.include_path} is not a directory")
        include = str(options.include_path)
        # Reading the harness's thousands of tasks takes seconds, which local ones need not wait for.
        local = _Manager(include_path=include, include_defaults=False)
        if all(local.match_tasks([name]) for name in options.tasks):
            return Tasks(local, _matches(local, options.tasks))
    manager = _Manager(include_path=include)
    return Tasks(manager, _matches(manager, options.tasks))


def _matches(manager: TaskManager, names: Sequence[str]) -> tuple[str, ...]:
    found: list[str] = []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            if not Path(name).is_file():
                raise UserError(f"no task file {name}")
            found.append(name)
            continue
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            raise UserError(
                f"lm-evaluation-harness has no task {name!r}"
                + (f"; the nearest are {', '.join(near)}" if near else "; `lm_eval ls tasks` lists them")
            )
        found += matches
    return tuple(dict.fromkeys(found))
