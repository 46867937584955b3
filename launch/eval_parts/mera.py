"""The part of `python -m launch eval` that runs MERA."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.evaluate.mera.run import Questions, TaskRun
    from tlite_jax.evaluate.mera.tasks import Split

HUB = "hub"
_SPLITS = {"test": "test", "train": "labelled", "public_test": "labelled", "validation": "validation"}
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "config.json", "checkpoint.json")


@dataclasses.dataclass(frozen=True)
class MeraOptions:
    """What the command line says about MERA.

    Attributes:
      data: directory of the dataset, or "hub", or "hub@REVISION".
      version: of the rules.
      split: "test", "train" or "public_test" (whichever a task has), "validation".
      tasks: names with commas between; None: the 17 of the total.
      limit: documents of each task, or a share of them below 1; None: all.
      allow_code: whether ruHumanEval's programs may run.
    """

    data: str
    version: str
    split: str
    tasks: str | None
    limit: float | None
    allow_code: bool


def evaluate_mera(
    checkpoint: Path, options: MeraOptions, output: Path | None, *, step: int | str | None, as_json: bool, **model: Any
) -> None:
    """Asks a checkpoint MERA's questions; prints the scores and writes results and the submission.

    Args:
      checkpoint: anything that `open_language_model` opens.
      options: of MERA.
      output: directory for answers, results and the submission; an interrupted run goes on there.
      step: of a run.
      as_json: print results.json instead of the table.
      model: dtype, batch_tokens and max_length of `open_language_model`; None: its own.

    Raises:
      UserError: unknown version, task or split; missing or broken documents; no output directory.
    """
    from launch.language_model import open_language_model
    from tlite_jax.evaluate.mera.run import prepare
    from tlite_jax.evaluate.mera.tasks import check_version, select_tasks
    from tlite_jax.evaluate.mera.text_model import MeraModel

    check_version(options.version)
    tasks = select_tasks(None if options.tasks is None else [name.strip() for name in options.tasks.split(",")])
    split = _split(options.split)
    if output is None:
        raise UserError("--mera needs --output DIRECTORY, for the answers, the results and the submission")
    if options.limit is not None and options.limit >= 1 and options.limit % 1:
        raise UserError(f"--limit {options.limit}: a whole number of documents, or a share of them below 1")
    root = _dataset(options.data)
    # What is missing or broken is said before a model is read.
    questions = [prepare(root, task, split=split, limit=options.limit) for task in tasks]
    sampling = sampling_of(checkpoint, step)
    given = {name: value for name, value in model.items() if value is not None}
    language_model = open_language_model(checkpoint, step=step, **given)
    mera = MeraModel(language_model, sampling)
    identity = {
        "version": options.version,
        "checkpoint": fingerprint(checkpoint, step),
        "dtype": language_model.dtype,
        "max_length": language_model.max_length,
        "sampling": str(sampling),
    }
    runs = _run(mera, questions, options, output / "answers", identity, quiet=as_json)
    _finish(runs, options, split, output, {**identity, "truncated": mera.num_truncated}, as_json=as_json)


def fingerprint(checkpoint: Path, step: int | str | None) -> str:
    """Changes with the weights' files: their names, sizes and times; a hub id stands for itself."""
    from tlite_jax.bridge.hf import is_hub_id
    from tlite_jax.checkpoint import find

    if not checkpoint.exists() and is_hub_id(str(checkpoint)):
        return str(checkpoint)
    if checkpoint.is_file():
        files = [checkpoint]
    elif (checkpoint / "config.json").is_file():
        files = sorted({path for pattern in _WEIGHTS for path in checkpoint.glob(pattern)})
    else:
        files = sorted(path for path in find(checkpoint, step).path.rglob("*") if path.is_file())
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _split(name: str) -> "Split":
    if name not in _SPLITS:
        raise UserError(f"--mera-split {name}: choose {', '.join(_SPLITS)}")
    return _SPLITS[name]  # type: ignore[return-value]


def _dataset(data: str) -> Path:
    from tlite_jax.evaluate.mera.documents import download

    name, _, revision = data.partition("@")
    if name == HUB and not Path(data).exists():
        return download(revision or None)
    if not Path(data).is_dir():
        raise UserError(f"--mera {data}: no such directory; give a copy of MERA's dataset, or {HUB}")
    return Path(data)


def sampling_of(checkpoint: Path, step: int | str | None) -> Any:
    """What the model's generation_config.json says, else what transformers takes without one."""
    from tlite_jax.bridge.hf import is_hub_id
    from tlite_jax.checkpoint import find
    from tlite_jax.evaluate.mera.text_model import USUAL_SAMPLING

    given: dict[str, Any] = {}
    if not checkpoint.is_file() and (checkpoint.exists() or not is_hub_id(str(checkpoint))):
        is_foreign = (checkpoint / "config.json").is_file()
        file = (checkpoint if is_foreign else find(checkpoint, step).tokenizer_dir) / "generation_config.json"
        given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = ("temperature", "top_k", "top_p", "repetition_penalty")
    return dataclasses.replace(USUAL_SAMPLING, **{name: given[name] for name in known if given.get(name)})


def _run(
    model: Any,
    questions: "Sequence[Questions]",
    options: MeraOptions,
    store: Path,
    identity: dict[str, Any],
    *,
    quiet: bool,
) -> "list[TaskRun]":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tlite_jax.evaluate.mera.run import run_task

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    runs = []
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        bars: dict[str, Any] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = bar.add_task(name, total=total)
            bar.update(bars[name], completed=done, total=total)

        for asked in questions:
            if not console.is_terminal and not quiet:
                console.print(f"{asked.task.name} ...", highlight=False)
            run = run_task(model, asked, allow_code=options.allow_code, store=store, identity=identity, progress=show)
            runs.append(run)
    return runs


def _finish(
    runs: "Sequence[TaskRun]",
    options: MeraOptions,
    split: "Split",
    output: Path,
    facts: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    from tlite_jax.evaluate.mera.report import results, write_submission

    notes = []
    found = {**facts, "split": options.split, "limit": options.limit, **results(runs), "submission": None}
    if split == "test" and options.limit is None:
        path = output / "submission.zip"
        missing = write_submission(path, runs)
        found["submission"] = str(path)
        notes.append(f"submission: {path}")
        if missing:
            notes.append(f"MERA's site also wants {', '.join(missing)}: --mera-tasks all --allow-code-execution")
    if any(run.task.kind == "code" and not run.is_answered for run in runs):
        notes.append("ruHumanEval's programs were not run: --allow-code-execution runs them, with limits, here")
    if any(run.task.name == "BPS" and run.is_answered for run in runs):
        notes.append("BPS: answered the wrong way round, as MERA 1.1.0 submits it (docs/mera.md)")
    if found["total"] is None:
        notes.append("no total: it needs answers to all 17 tasks, and documents that say what is right")
    (output / "results.json").write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _print(found, notes)


def _print(found: dict[str, Any], notes: Sequence[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"MERA {found['version']}, {found['split']}")
    for column in ("task", "shots", "documents", "metrics", "score"):
        is_text = column in ("task", "metrics")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for name, task in found["tasks"].items():
        values = [f"{key} {value:.3f}" for key, value in (task["metrics"] or {}).items() if "." not in key]
        score = "-" if task["score"] is None else f"{task['score']:.4f}"
        table.add_row(name, str(task["shots"]), f"{task['documents']:,}", ", ".join(values) or "-", score)
    total = "-" if found["total"] is None else f"{found['total']:.4f}"
    table.add_section()
    table.add_row("total", "", "", "", total)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
