"""`python -m launch import SRC DST`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.byte_progress import byte_progress
from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.bridge.assemble import Imported


def main(
    src: Annotated[str, typer.Argument(help="Hugging Face directory, hub id (org/name) or .gguf file.")],
    dst: Annotated[Path, typer.Argument(help="New run directory: the model becomes its step 0.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
) -> None:
    """Turn a Hugging Face or GGUF model into a checkpoint.

    Example: python -m launch import models/SmolLM2-135M runs/smollm2
    """
    import_model(src, dst, revision)


def import_model(src: str, dst: Path, revision: str | None = None) -> None:
    """Reads a model and writes it, with its tokenizer, as step 0 of a new run directory, whole or not at all.

    Args:
      src: a Hugging Face directory or one weights file in it, a hub id, or a GGUF file.
      dst: must not exist, or be an empty directory.
      revision: of a hub id; None: its main branch.

    Raises:
      UserError: `src` is none of these or cannot be used (the line says why), or `dst` is occupied.
    """
    from tlite_jax.bridge.files import new_directory, refuse_occupied
    from tlite_jax.checkpoint import save_model
    from tlite_jax.checkpoint.seal import seal_alone

    refuse_occupied(dst)
    imported = read_model(src, revision)
    with new_directory(dst) as run:
        (run / "tokenizer").mkdir()
        for name, content in imported.tokenizer.items():
            (run / "tokenizer" / name).write_bytes(content)
        seal_alone(run / "tokenizer")
        with byte_progress(f"reading {src}") as report:
            save_model(
                run,
                imported.params,
                imported.model,
                weights_dtype=imported.weights_dtype,
                origin=src,
                tensor_dtypes=imported.tensor_dtypes,
                report=report,
            )
    for note in imported.notes:
        print(f"note: {note}")
    print(f"{dst}: step 0, weights {imported.weights_dtype}")


def read_model(src: str, revision: str | None = None) -> "Imported":
    """Opens a model, its weights unread, with its tokenizer's files; arguments and errors as for `import_model`."""
    from tlite_jax.bridge.gguf import import_gguf
    from tlite_jax.bridge.hf import download, import_hf, is_hub_id

    path = Path(src)
    if not path.exists():
        if not is_hub_id(src):
            raise UserError(f"{src}: no such file or directory, and not a hub id (org/name)")
        path = download(src, revision)
    elif revision is not None:
        raise UserError(f"--revision is for hub ids; {src} is on this machine")
    if path.is_dir() and not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
        raise UserError(f"{src} holds GGUF files; give one of them: {', '.join(map(str, files))}")
    import_ = import_gguf if path.is_file() and path.suffix not in (".safetensors", ".bin") else import_hf
    return import_(path)
