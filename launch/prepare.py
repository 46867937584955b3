"""`python -m launch prepare`: documents -> buckets."""

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tlite_jax.errors import UserError, require

if TYPE_CHECKING:
    from rich.progress import TaskID

    from tlite_jax.config import RunConfig
    from tlite_jax.data.prepare import PrepareReport


class Kind(StrEnum):
    """What runs the tasks."""

    processes = "processes"
    local = "local"
    slurm = "slurm"
    ray = "ray"


_EXECUTOR = "What runs the tasks: processes of this machine, or datatrove's executors (extra data)."


def main(
    config: Annotated[Path, typer.Argument(help="A run's YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace buckets made from something else.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    executor: Annotated[Kind, typer.Option(help=_EXECUTOR)] = Kind.processes,
    tasks: Annotated[int | None, typer.Option(min=1, help="Tasks to cut the work into [one a shard].")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Tasks at a time [all].")] = None,
    logs: Annotated[Path | None, typer.Option(help="Where tasks log [data.buckets + .logs].")] = None,
    memory_gb: Annotated[int, typer.Option(min=1, help="Memory of a task's core.")] = 2,
    partition: Annotated[str | None, typer.Option(help="Slurm: the partition.")] = None,
    time: Annotated[str, typer.Option(help="Slurm: the limit of each job.")] = "24:00:00",
    join_cores: Annotated[int, typer.Option(min=1, help="Slurm: cores of the job that writes buckets.")] = 8,
    sbatch: Annotated[list[str] | None, typer.Option(help="Slurm: option=value for sbatch, e.g. account=lab.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Ray: the cluster [one started here].")] = None,
) -> None:
    """Tokenise documents into buckets, duplicates removed and held-out documents set aside.

    Example: python -m launch prepare configs/tiny.yaml data.prepare.num_workers=8

    On a cluster: python -m launch prepare CONFIG --executor slurm --partition cpu --tasks 500
    """
    from tlite_jax.config_files import load_config
    from tlite_jax.data.prepare import prepare

    run = resolve_model(load_config(config, overrides or ()))
    run_shards = None
    if executor is not Kind.processes:
        cluster = _cluster(executor)
        directory = logs or run.data.buckets.with_name(f"{run.data.buckets.name}.logs")
        how = cluster.Executor(tasks, workers, directory, memory_gb)
        if executor is Kind.slurm:
            options = dict(_option(word) for word in sbatch or ())
            slurm = cluster.Slurm(_partition(partition), time, join_cores, options)
            _submit(cluster, run, how, slurm, force=force, as_json=as_json)
            return
        run_shards = cluster.run_local(how) if executor is Kind.local else cluster.run_ray(how, ray_address)
    with shown_progress(as_json) as show:
        report = prepare(run, tokenizer_directory(run), show, force=force, run_shards=run_shards)
    _show(report, as_json)


def _show(report: "PrepareReport", as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(report), ensure_ascii=False, indent=1))
    else:
        _print(report)


@contextmanager
def shown_progress(as_json: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage on a terminal, a line for each elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=as_json or not console.is_terminal) as bar:
        stages: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bar.add_task(stage, total=total)
                if not console.is_terminal and not as_json:
                    console.print(f"{stage} ...", highlight=False)
            bar.update(stages[stage], completed=done)

        yield show


def _cluster(kind: Kind) -> ModuleType:
    """The module that knows datatrove, where that is installed."""
    require("datatrove", extra="data", purpose=f"--executor {kind}")
    if kind is Kind.ray:
        require("ray", extra="ray", purpose="--executor ray")
    return importlib.import_module("tlite_jax.data.cluster")


def _partition(name: str | None) -> str:
    if name is None:
        raise UserError("--executor slurm needs --partition; sinfo lists them")
    return name


def _option(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise UserError(f"--sbatch {word}: write option=value, e.g. --sbatch account=lab")
    return name.lstrip("-"), value


def _submit(cluster: Any, run: "RunConfig", how: Any, slurm: Any, *, force: bool, as_json: bool) -> None:
    from tlite_jax.data.preparation import find_preparation
    from tlite_jax.data.prepare import PrepareReport

    done = cluster.submit_slurm(find_preparation(run, tokenizer_directory(run)), how, slurm, force=force)
    if isinstance(done, PrepareReport):
        _show(done, as_json)
    elif as_json:
        print(json.dumps({"submitted": asdict(done)}))
    else:
        shards = f"{done.shards} shards in {done.tasks} tasks as job {done.tokenize_job}"
        print(f"submitted: {shards}, then their join as job {done.join_job}; logs in {how.logs}")


def tokenizer_directory(run: "RunConfig") -> Path:
    """Where the tokenizer lies: data.tokenizer, or beside the checkpoint the run starts from."""
    if run.data.tokenizer is not None:
        return run.data.tokenizer
    assert run.init_from is not None, "the config has checked it"
    from tlite_jax import checkpoint

    return checkpoint.find(run.init_from.path, run.init_from.step).tokenizer_dir


def resolve_model(run: "RunConfig") -> "RunConfig":
    """Fills in the model of the checkpoint that the run starts from, so that its vocabulary can be checked."""
    if run.model is not None or run.init_from is None:
        return run
    from tlite_jax import checkpoint

    meta = checkpoint.find(run.init_from.path, run.init_from.step).meta
    return run.model_copy(update={"model": meta.model})


def _print(report: "PrepareReport") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from launch.mixture_parts.table import WIDTH_OF_A_FILE

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ("bucket", "documents", "tokens", "rows", "padding", "fill", "held out", "exact dup.", "near dup.")
    for name in columns:
        is_name = name == "bucket"
        table.add_column(name, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for b in report.buckets:
        counts = (b.held_out_documents, b.exact_duplicates, b.near_duplicates)
        sizes = (b.documents, b.tokens, b.rows, b.padding_tokens)
        name = f"{b.name} (never trained)" if b.never_trained else b.name
        fill = f"{b.fill:.2%}" if b.rows else "-"
        table.add_row(name, *(f"{size:,}" for size in sizes), fill, *(f"{count:,}" for count in counts))
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    console.print(table)
    for b in report.buckets:
        if b.split_documents:
            line = f"{b.name}: {b.split_documents:,} documents are longer than a row and were cut; nothing is lost"
            console.print(line, highlight=False, markup=False)
    for label, values in report.label_counts.items():
        shown = ", ".join(f"{value} {count:,}" for value, count in sorted(values.items(), key=lambda item: -item[1]))
        console.print(f"{label}, as labelled: {shown}", highlight=False, markup=False)
    for line in _what_was_removed(report):
        console.print(line, highlight=False, markup=False)
    done = "nothing to do: made already from the same documents" if report.reused else "prepared"
    console.print(f"{done}: {report.documents_read:,} documents in {report.directory}", highlight=False, markup=False)


def _what_was_removed(report: "PrepareReport") -> Iterator[str]:
    for source, reasons in report.quarantined.items():
        for reason, count in sorted(reasons.items()):
            yield f"quarantined from {source}: {count:,} ({reason})"
    if any(report.quarantined.values()):
        yield f"each is listed in {report.directory}/quarantine.jsonl"
    for name, counts in report.evaluation_items.items():
        short = f", {counts['too_short']:,} too short to be looked for" if counts["too_short"] else ""
        yield f"evaluation set {name}: {counts['items']:,} items{short}"
    for source, sets in report.contaminated.items():
        for name, actions in sets.items():
            done = " and ".join(f"{count:,} {action}" for action, count in actions.items())
            yield f"repeated {name} in {source}: {done}"
    if any(report.contaminated.values()):
        yield f"each is listed in {report.directory}/contamination.jsonl"
    padded = [bucket for bucket in report.buckets if bucket.padding_tokens]
    if padded:
        tokens = sum(bucket.padding_tokens for bucket in padded)
        yield f"{tokens:,} tokens of padding fill rows of {len(padded):,} buckets; no token of a document is lost"
