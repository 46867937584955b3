"""`python -m launch corpus`: labelled text to try recipes on."""

import json
from pathlib import Path
from typing import Annotated

import typer


def main(
    directory: Annotated[Path, typer.Argument(help="Where the jsonl files go, one per source.")],
    limit_mb: Annotated[float | None, typer.Option(min=0.01, help="The most of each part, for a try.")] = None,
    vocabulary: Annotated[
        int | None, typer.Option(min=300, help="Also learn a byte-level BPE tokenizer of so many ids from it.")
    ] = None,
    smollm2: Annotated[
        Path | None, typer.Option(help="Also fetch SmolLM2-135M-Instruct (93 MB, a GGUF file) into this directory.")
    ] = None,
) -> None:
    """Write 20 MB of Debian's documentation as labelled documents: source, language, style and domain. Needs apt-get.

    Example: python -m launch corpus runs/russian_25mb/corpus --vocabulary 4096
    """
    from launch.quickstart_parts.base_model import fetch_smollm2, tiny_tokenizer
    from launch.quickstart_parts.labelled import write_labelled_corpus

    write_labelled_corpus(directory, limit_mb=limit_mb)
    if vocabulary is not None:
        files = sorted(directory.glob("*.jsonl"))
        texts = (json.loads(line)["text"] for file in files for line in file.open(encoding="utf-8"))
        tiny_tokenizer(directory / "tokenizer", texts, vocabulary)
        print(f"tokenizer: {vocabulary:,} ids in {directory / 'tokenizer'}")
    if smollm2 is not None:
        print(f"model: {fetch_smollm2(smollm2)}")
