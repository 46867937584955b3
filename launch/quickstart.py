"""`python -m launch quickstart`: the whole path of a run, small but real.

corpus -> base model -> buckets -> training -> bits per byte before and after -> HF directory, samples, plot
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from launch.quickstart_parts.corpus import Corpus
    from tlite_jax.config import RunConfig
    from tlite_jax.train.run import Run

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PROMPT = "Чтобы сохранить документ, нужно"
SAMPLE_TOKENS = 48


def main(
    model: Annotated[str, typer.Option(help="smollm2: a real 135M model; tiny: a random one, nothing to download.")] = (
        "smollm2"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Default: as the config says.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: runs/quickstart or runs/tiny.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    sample_only: Annotated[
        bool, typer.Option("--sample-only", help="Use the repository's own sample of text.")
    ] = False,
) -> None:
    """Adapt a small real model to Russian on this machine, end to end. Interrupted, the same command goes on.

    Example: python -m launch quickstart --steps 60 --out runs/longer
    """
    names = {"smollm2": "quickstart", "tiny": "tiny"}
    if model not in names:
        raise UserError(f"--model {model} is not known; choose from {', '.join(names)}")
    directory = out or Path("runs") / names[model]
    from tlite_jax.train.run import check_writable

    check_writable(directory)
    from launch.quickstart_parts.corpus import build_corpus
    from launch.train import EXIT_INTERRUPTED, train_run
    from tlite_jax.data.prepare import prepare
    from tlite_jax.telemetry.plots import plot_loss
    from tlite_jax.train.run import open_run

    corpus = build_corpus(directory / "corpus", sample_only=sample_only or model == "tiny")
    config = _config(CONFIGS / f"{names[model]}.yaml", directory, corpus, steps, seed)
    base = _base_model(model, config, corpus, directory)
    print("buckets: tokenising, removing near-duplicates, setting documents aside")
    prepare(config, base / "tokenizer")
    run = open_run(config)
    if train_run(run).signal is not None:
        raise typer.Exit(EXIT_INTERRUPTED)
    plot = directory / "loss.png"
    plot_loss(run.directory / "metrics.jsonl", plot, f"{model} to Russian")
    exported = _export(run, directory)
    _show(run, base, _samples(base, run), {"run": run.directory, "HF model": exported, "loss plot": plot})


def _config(file: Path, directory: Path, corpus: "Corpus", steps: int | None, seed: int) -> "RunConfig":
    import jax

    from tlite_jax.config_files import load_config, override

    words = [
        f"output={directory / 'run'}",
        f"seed={seed}",
        f"init_from.path={directory / 'base'}",
        f"data.buckets={directory / 'buckets'}",
    ]
    if steps is not None:
        words += [f"train.steps={steps}", f"evaluation.every={steps}"]
    config = load_config(file, words)
    # On a machine with several devices the batch grows to what they can share.
    unit = jax.device_count() * config.execution.num_microbatches
    config = override(config, [f"train.batch_size={-(-config.train.batch_size // unit) * unit}"])
    assert config.data.prepare is not None
    sources = [source.model_dump(mode="json") for source in corpus.sources]
    return override(config, [f"data.prepare.sources={json.dumps(sources)}"])


def _base_model(model: str, config: "RunConfig", corpus: "Corpus", directory: Path) -> Path:
    """Makes or finds the checkpoint to start from."""
    from launch.import_ import import_model
    from launch.quickstart_parts.base_model import fetch_smollm2
    from tlite_jax.checkpoint import steps_on_disk

    base = directory / "base"
    if steps_on_disk(base):
        return base
    if model == "smollm2":
        import_model(str(fetch_smollm2(directory / "download")), base)
    else:
        _random_model(config, corpus, base)
    return base


def _random_model(config: "RunConfig", corpus: "Corpus", base: Path) -> None:
    from launch.quickstart_parts.base_model import tiny_tokenizer
    from tlite_jax.bridge.files import new_directory
    from tlite_jax.checkpoint import save_model
    from tlite_jax.model.decoder import init_params

    assert config.model is not None
    files = [Path(path) for source in corpus.sources if source.training for path in source.paths]
    texts = (json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines())
    with new_directory(base) as partial:
        tiny_tokenizer(partial / "tokenizer", texts, config.model.vocab_size)
        params = init_params(config.model, config.seed)
        save_model(partial, params, config.model, weights_dtype="float32", origin="random weights")


def _export(run: "Run", directory: Path) -> Path:
    from launch.export import export_model

    exported = directory / "hf"
    shutil.rmtree(exported, ignore_errors=True)  # an earlier call's, of this very run
    export_model(run.directory, exported)
    return exported


def _samples(base: Path, run: "Run") -> list[str]:
    from launch.generate import continue_text
    from tlite_jax.checkpoint import find
    from tlite_jax.generate import Sampling

    return [
        continue_text(find(place), PROMPT, max_new_tokens=SAMPLE_TOKENS, sampling=Sampling())
        for place in (base, run.directory)
    ]


def _bits_per_byte(run: "Run", step: int, checkpoint: Path) -> dict[str, float]:
    """Scores of held-out text at a step: as logged, or measured now if the run was stopped before it could log them."""
    from launch.eval_ import score_checkpoint
    from tlite_jax.checkpoint import find
    from tlite_jax.evaluate.bits_per_byte import by_name
    from tlite_jax.telemetry.metrics import read_jsonl

    lines = read_jsonl(run.directory / "metrics.jsonl")
    logged = [line for line in lines if line["step"] == step and any("/" in name for name in line)]
    if logged:
        scores: dict[str, float] = logged[-1]
    else:
        limit, dtype = run.config.evaluation.max_tokens, run.config.execution.compute_dtype
        buckets, measured = score_checkpoint(find(checkpoint), run.config.data.buckets, max_tokens=limit, dtype=dtype)
        scores = {f"bits_per_byte/{name}": score.bits_per_byte for name, score in by_name(measured, buckets).items()}
    return {name.removeprefix("bits_per_byte/"): value for name, value in scores.items() if "/" in name}


def _show(run: "Run", base: Path, samples: list[str], paths: Mapping[str, Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    from tlite_jax.data.buckets import read_held_out

    console = Console()
    before, after = _bits_per_byte(run, 0, base), _bits_per_byte(run, run.total_steps, run.directory)
    names = {"Russian": "language=ru", "English": "language=en", "code": "language=code"}
    for bucket in read_held_out(run.config.data.buckets):
        if bucket.never_trained:
            names[f"{bucket.labels['source']} (never trained on)"] = bucket.name
    table = Table("held-out text", "before", "after", "change", title="bits per byte")
    for title, name in names.items():
        change = after[name] / before[name] - 1
        table.add_row(title, f"{before[name]:.3f}", f"{after[name]:.3f}", f"{change:+.1%}")
    console.print(table)
    seen = Table("bucket", "tokens seen", "epochs", title="what it was trained on")
    rows = run.total_steps * run.config.train.batch_size
    consumed = run.timeline.consumed(rows)
    for planned in run.timeline.buckets:
        tokens = consumed[planned.name] * run.config.data.sequence_length
        seen.add_row(planned.name, f"{tokens:,}", f"{consumed[planned.name] / planned.rows:.3f}")
    console.print(seen)
    for title, text in zip(("before", "after"), samples, strict=True):
        console.print(f"{title}: {PROMPT}{text}".strip(), highlight=False, markup=False)
    for title, path in paths.items():
        console.print(f"{title}: {path}", highlight=False, soft_wrap=True)
