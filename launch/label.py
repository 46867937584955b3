"""`python -m launch label train|apply`: classifiers of documents."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tlite_jax.data.documents import Document
    from tlite_jax.data.labels.model import TextModel
    from tlite_jax.data.labels.training import Evaluation

app = typer.Typer(
    help="Train a classifier of style, topic, domain or quality, and look at what it says.\n\n"
    "Example: python -m launch label train docs.jsonl --label style --out style.npz",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Data = Annotated[list[str], typer.Argument(help="jsonl, parquet or text files, or patterns.")]
TextField = Annotated[str, typer.Option(help="Field or column with the text.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_APPLY_BATCH, _SHARD_BYTES = 256, 1 << 30


@app.command()
def train(
    data: Data,
    label: Annotated[str, typer.Option(help="The label to learn; also the field that holds it.")],
    out: Annotated[Path, typer.Option(help="Where the model goes, e.g. style.npz.")],
    text_field: TextField = "text",
    field: Annotated[str | None, typer.Option(help="Field or column with the label; default: --label.")] = None,
    held_out: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of documents to score it on.")] = 0.1,
    max_documents: Annotated[int, typer.Option(min=10, help="Documents used at most, chosen by hash.")] = 200_000,
    ngrams: Annotated[tuple[int, int], typer.Option(help="Shortest and longest n-gram of characters.")] = (2, 4),
    bits: Annotated[int, typer.Option(min=10, max=24, help="Features: 2 to this power.")] = 18,
    as_json: Json = False,
) -> None:
    """Train on documents whose label is known; print how well it does on those set aside.

    Example: python -m launch label train docs.jsonl --label style --out style.npz
    """
    from tlite_jax.data.labels.model import Features
    from tlite_jax.data.labels.training import train as train_model
    from tlite_jax.errors import UserError

    if not 1 <= ngrams[0] <= ngrams[1] <= 8:
        raise UserError(f"--ngrams {ngrams[0]} {ngrams[1]}: give two numbers from 1 to 8, the smaller one first")
    features = Features(bits=bits, shortest=ngrams[0], longest=ngrams[1])
    pairs = (
        (document.text, document.labels[label]) for _, document in _read(data, text_field, {label: field or label})
    )
    model, found = train_model(pairs, label, held_out=held_out, features=features, max_documents=max_documents)
    model.save(out)
    if as_json:
        print(json.dumps({"model": str(out), "hash": model.hash(), **asdict(found)}, ensure_ascii=False, indent=1))
    else:
        _print_evaluation(model, found, out)


@app.command()
def apply(
    model: Annotated[Path, typer.Argument(help="What `label train` wrote.")],
    data: Data,
    text_field: TextField = "text",
    min_confidence: Annotated[float, typer.Option(min=0, max=1, help="Below it a document is unknown.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="jsonl: hash, file, line, label and confidence.")] = None,
    as_json: Json = False,
) -> None:
    """Count what a model says of documents; with --out, say it of each. A labeller of `prepare` can join that file.

    Example: python -m launch label apply style.npz docs.jsonl --min-confidence 0.6 --out style.jsonl
    """
    from tlite_jax.data.labels.model import TextModel

    loaded = TextModel.load(model)
    counts = _apply(loaded, data, text_field, min_confidence, out)
    total = sum(counts.values())
    if as_json:
        print(json.dumps({"label": loaded.label, "documents": total, "counts": counts}, ensure_ascii=False, indent=1))
        return
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{loaded.label}={name}: {count:,} documents, {count / total:.2%}")


def _apply(
    model: "TextModel", data: list[str], text_field: str, min_confidence: float, out: Path | None
) -> dict[str, int]:
    """Labels documents a batch at a time; returns how many have each value."""
    import contextlib
    import itertools

    from tlite_jax.data.labels.labeller import UNKNOWN, text_hash
    from tlite_jax.errors import UserError

    counts: dict[str, int] = {}
    try:
        with out.open("w", encoding="utf-8") if out is not None else contextlib.nullcontext() as file:
            documents = _read(data, text_field, {})
            while batch := list(itertools.islice(documents, _APPLY_BATCH)):
                probabilities = model.probabilities([document.text for _, document in batch])
                for (path, document), row in zip(batch, probabilities, strict=True):
                    best, confidence = int(row.argmax()), float(row.max())
                    name = model.classes[best] if confidence >= min_confidence else UNKNOWN
                    counts[name] = counts.get(name, 0) + 1
                    if file is not None:
                        line = {"hash": text_hash(document.text), "file": path, "line": document.line}
                        values = {**line, model.label: name, "confidence": round(confidence, 4)}
                        file.write(json.dumps(values, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    if not counts:
        raise UserError(f"no documents in {', '.join(data)}")
    return counts


def _read(data: list[str], text_field: str, label_fields: dict[str, str]) -> "Iterator[tuple[str, Document]]":
    """(file, document) of every document that can be used; how many cannot is said on stderr."""
    import sys
    from collections import Counter

    from tlite_jax.config import SourceConfig
    from tlite_jax.data.documents import BadDocument, make_shards, read_piece
    from tlite_jax.data.inputs import find_files

    source = SourceConfig(name="data", paths=tuple(data), text_field=text_field, label_fields=label_fields)
    bad: Counter[str] = Counter()
    for shard in make_shards(source, find_files(source), _SHARD_BYTES):
        for piece in shard.pieces:
            for document in read_piece(source, piece, 10_000_000):
                if isinstance(document, BadDocument):
                    bad[document.reason] += document.documents
                else:
                    yield piece.file.path, document
    for reason, count in sorted(bad.items()):
        print(f"left out: {count:,} documents ({reason})", file=sys.stderr)


def _print_evaluation(model: "TextModel", found: "Evaluation", out: Path) -> None:
    print(f"{out}: label {model.label}, {len(model.classes)} classes, hash {model.hash()}")
    guess = f"always the most frequent class: {found.most_frequent_class:.2%}"
    print(f"held out: {found.documents:,} documents, accuracy {found.accuracy:.2%} ({guess})")
    width = max(len(name) for name in model.classes)
    print(f"{'class':{width}}  documents  precision   recall")
    for score in found.classes:
        print(f"{score.name:{width}}  {score.documents:9,}  {score.precision:9.2%}  {score.recall:7.2%}")
    for true, taken, count in found.confusions:
        print(f"taken for {taken} though {true}: {count:,}")
