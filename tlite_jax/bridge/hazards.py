"""Files of a Hugging Face directory that make other programs read something else than the model that is there."""

import os
from collections.abc import Iterator
from pathlib import Path

from tlite_jax.bridge.files import contained, read_json, shown
from tlite_jax.bridge.tokenizer import TOKENIZER_CONFIG
from tlite_jax.errors import UserError

_MAX_SETTINGS_BYTES = 16 << 20
ADAPTER = "adapter_config.json"


def hazards(directory: Path) -> Iterator[tuple[str, str]]:
    """Yields (file, what is wrong with it).

    Named are links that lead out of the directory or nowhere, what is neither file nor directory, an adapter
    (Transformers puts it on top of the model, or takes another model below it), and settings of a tokenizer that name
    files by path.
    """
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        label = shown(entry.name)
        if entry.is_dir(follow_symlinks=False):
            continue
        if entry.is_symlink():
            if problem := _of_a_link(directory, entry.name):
                yield label, problem
        elif not entry.is_file():
            yield label, "is neither a file nor a directory"
        if entry.name == ADAPTER:
            yield label, "an adapter, which Transformers puts on top of the weights; merge or remove it"
    if (directory / TOKENIZER_CONFIG).is_file() and (named := _named_paths(directory)):
        yield TOKENIZER_CONFIG, f"names files by path: {', '.join(map(shown, named[:5]))}; remove these settings"


def _of_a_link(directory: Path, name: str) -> str:
    path = directory / name
    if path.is_dir():
        inside = path.resolve().is_relative_to(directory.resolve())
        return "" if inside else "is a link out of the directory; put the files themselves there"
    try:
        contained(directory, name, name)
    except UserError as error:
        return str(error).removeprefix(f"{name}: ")
    return ""


def _named_paths(directory: Path) -> list[str]:
    """Keys such as tokenizer_file and vocab_file, which Transformers prefers to the files of the directory."""
    try:
        values = read_json(contained(directory, TOKENIZER_CONFIG, TOKENIZER_CONFIG), _MAX_SETTINGS_BYTES)
    except UserError:
        return []  # said by whoever reads the tokenizer
    return [name for name, value in values.items() if name.endswith("_file") and value is not None]
