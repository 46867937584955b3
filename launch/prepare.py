"""`python -m launch prepare`: documents -> buckets."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tlite_jax.config import RunConfig
    from tlite_jax.data.prepare import PrepareReport


def main(
    config: Annotated[Path, typer.Argument(help="A run's YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value ...")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace buckets made from something else.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Tokenise documents into buckets, duplicates removed and held-out documents set aside.

    Example: python -m launch prepare configs/tiny.yaml data.prepare.num_workers=8
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tlite_jax.config_files import load_config
    from tlite_jax.data.prepare import prepare

    run = resolve_model(load_config(config, overrides or ()))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=as_json or not console.is_terminal) as bar:
        tasks: dict[str, object] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
                if not console.is_terminal and not as_json:
                    console.print(f"{stage} ...", highlight=False)
            bar.update(tasks[stage], completed=done)  # type: ignore[arg-type]

        report = prepare(run, tokenizer_directory(run), show, force=force)
    if as_json:
        print(json.dumps(asdict(report), ensure_ascii=False, indent=1))
    else:
        _print(report)


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
    for source, reasons in report.quarantined.items():
        for reason, count in sorted(reasons.items()):
            console.print(f"quarantined from {source}: {count:,} ({reason})", highlight=False, markup=False)
    if any(reasons for reasons in report.quarantined.values()):
        console.print(f"each is listed in {report.directory}/quarantine.jsonl", highlight=False, markup=False)
    done = "nothing to do: made already from the same documents" if report.reused else "prepared"
    console.print(f"{done}: {report.documents_read:,} documents in {report.directory}", highlight=False, markup=False)
