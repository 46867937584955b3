"""`python -m launch export CHECKPOINT DST`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from launch.byte_progress import byte_progress
from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.bridge.assemble import WeightsDtype
    from tlite_jax.bridge.gguf_metadata import ReleaseFacts

_DTYPES = ("bfloat16", "float16", "float32")


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Run directory, or one RUN/checkpoints/STEP.")],
    dst: Annotated[Path, typer.Argument(help="hf: new directory. gguf: directory for NAME.TYPE.gguf, made if absent.")],
    format_: Annotated[
        str, typer.Option("--format", help="hf: a Hugging Face directory. gguf: files for llama.cpp.")
    ] = "hf",
    step: Annotated[str | None, typer.Option(help="Step of the run, or best; default: the newest.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(_DTYPES)}. hf: of the weights; default: what the imported model was stored in. "
            "gguf: round matrices to it before they are quantised; default: take them as stored."
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="hf: largest weights file, e.g. 5GB, 500MB.")] = "5GB",
    type_: Annotated[
        list[str] | None, typer.Option("--type", help="gguf: a type such as Q4_K_M; may be given several times.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="gguf: the model's name; default: the run directory's.")] = None,
    license_: Annotated[str | None, typer.Option("--license", help="gguf: licence, e.g. apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option(help="gguf: hub id of the model it was trained from.")] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="gguf: language code, e.g. ru; may be given several times.")
    ] = None,
    pre_tokenizer: Annotated[
        str | None, typer.Option(help="gguf: llama.cpp's name of the pre-tokenizer, unchecked; default: recognised.")
    ] = None,
) -> None:
    """Write a checkpoint as a model that transformers or llama.cpp loads.

    Example: python -m launch export runs/stage1 release/my-model --dtype bfloat16

    Example: python -m launch export runs/stage1 release --format gguf --type Q4_K_M --type Q8_0 --name My-Model
    """
    if format_ not in ("hf", "gguf"):
        raise UserError(f"--format {format_} is not known; choose from hf, gguf")
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype} is not known; choose from {', '.join(_DTYPES)}")
    if format_ == "hf":
        for option, value in {
            "--type": type_,
            "--name": name,
            "--license": license_,
            "--base-model": base_model,
            "--language": language,
            "--pre-tokenizer": pre_tokenizer,
        }.items():
            if value:
                raise UserError(f"{option} is for --format gguf")
        export_model(checkpoint, dst, step=step, dtype=dtype, max_shard_size=max_shard_size)
        return
    from tlite_jax.bridge.gguf_metadata import ReleaseFacts

    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    facts = ReleaseFacts(name or run.resolve().name, license_, base_model, tuple(language or ()))
    export_gguf_files(checkpoint, dst, type_ or [], facts, step=step, dtype=dtype, pre_tokenizer=pre_tokenizer)


def export_model(
    checkpoint: Path, dst: Path, *, step: int | str | None = None, dtype: str | None = None, max_shard_size: str = "5GB"
) -> None:
    """Writes a checkpoint as a Hugging Face directory, whole or not at all.

    Args:
      checkpoint: a run directory, or RUN/checkpoints/STEP.
      dst: must not exist, or be an empty directory.
      step: of the run, or best; None: the newest.
      dtype: of all weights; None: each tensor's own at import, or the run's default.
      max_shard_size: of one weights file.

    Raises:
      UserError: no such checkpoint, or `dst` is occupied or cannot be written.
    """
    from tlite_jax.bridge.files import refuse_occupied
    from tlite_jax.bridge.hf import export_hf
    from tlite_jax.bridge.safetensors_io import parse_size
    from tlite_jax.checkpoint import find, open_params
    from tlite_jax.checkpoint.verify import intact_meanwhile

    max_shard_bytes = parse_size(max_shard_size)
    refuse_occupied(dst)
    found = find(checkpoint, step)
    weights_dtype = cast("WeightsDtype", dtype or found.meta.weights_dtype)
    with intact_meanwhile(found, ("params", "meta")) as require_intact, byte_progress(f"writing {dst}") as report:
        export_hf(
            open_params(found),
            found.meta.model,
            dst,
            found.tokenizer_dir if found.tokenizer_dir.is_dir() else None,
            weights_dtype,
            {} if dtype else found.meta.tensor_dtypes,
            max_shard_bytes,
            report,
            require_intact,
        )
    print(f"{dst}: step {found.step} of {found.run}, weights {weights_dtype}")


def export_gguf_files(
    checkpoint: Path,
    dst: Path,
    types: list[str],
    facts: "ReleaseFacts",
    *,
    step: int | str | None = None,
    dtype: str | None = None,
    pre_tokenizer: str | None = None,
) -> list[Path]:
    """Writes a checkpoint as GGUF files, NAME.TYPE.gguf with NAME.TYPE.gguf.sha256 beside it, each whole or not at all.

    Args:
      checkpoint: a run directory, or RUN/checkpoints/STEP.
      dst: directory; made when absent; must not hold the files yet.
      types: keys of gguf_types.FILE_TYPES.
      facts: the model's name and what else only its publisher knows; step, recipe and version are filled in.
      step: of the run, or best; None: the newest.
      dtype: matrices are rounded to it before they are quantised; None: they are taken as stored.
      pre_tokenizer: llama.cpp's name, taken unchecked; None: recognised.

    Returns:
      The files, in the order of `types`.

    Raises:
      UserError: no such checkpoint or type, a tokenizer that GGUF cannot express, files that exist already.
    """
    import dataclasses

    import tlite_jax
    from tlite_jax.bridge.checksums import SUFFIX, sums_text
    from tlite_jax.bridge.gguf_export import export_gguf
    from tlite_jax.bridge.gguf_tokenizer import tokenizer_to_gguf
    from tlite_jax.bridge.gguf_types import FILE_TYPES
    from tlite_jax.bridge.source import ParamsSource
    from tlite_jax.bridge.tokenizer import read_files
    from tlite_jax.checkpoint import find, open_params
    from tlite_jax.checkpoint.verify import intact_meanwhile
    from tlite_jax.config import digest

    types = list(dict.fromkeys(types))
    if not types or (unknown := [kind for kind in types if kind not in FILE_TYPES]):
        raise UserError(f"--type {unknown[0] if types else 'is missing'}: choose from {', '.join(FILE_TYPES)}")
    files = [dst / f"{facts.name}.{kind}.gguf" for kind in types]
    if there := [str(file) for file in files if file.exists() or file.is_symlink()]:
        raise UserError(f"{', '.join(there)} exists; remove it or choose another directory")
    found = find(checkpoint, step)
    facts = dataclasses.replace(
        facts,
        step=found.step,
        recipe_hash=digest(found.meta.config) if found.meta.config else None,
        version=tlite_jax.__version__,
    )
    model = found.meta.model
    tokenizer = tokenizer_to_gguf(
        read_files(found.tokenizer_dir), model.vocab_size, str(found.tokenizer_dir), pre_tokenizer
    )
    with intact_meanwhile(found, ("params", "meta")) as require_intact:
        source = ParamsSource(open_params(found), model)
        for file, kind in zip(files, types, strict=True):
            with byte_progress(f"writing {file}") as report:
                sha256 = export_gguf(source, model, file, kind, tokenizer, facts, dtype, report, require_intact)
            file.with_name(file.name + SUFFIX).write_text(sums_text({file.name: sha256}), encoding="utf-8")
            print(f"{file}: step {found.step} of {found.run}, {file.stat().st_size} bytes, SHA-256 {sha256}")
    return files
