"""`python -m launch export CHECKPOINT DST`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from launch.tensor_progress import tensor_progress
from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.bridge.assemble import WeightsDtype

_DTYPES = ("bfloat16", "float16", "float32")


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Run directory, or one RUN/checkpoints/STEP.")],
    dst: Annotated[Path, typer.Argument(help="New directory for the released model.")],
    format_: Annotated[str, typer.Option("--format", help="hf: a Hugging Face directory.")] = "hf",
    step: Annotated[int | None, typer.Option(help="Step of the run; default: the newest.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(_DTYPES)}; default: what the imported model was stored in.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file, e.g. 5GB, 500MB.")] = "5GB",
) -> None:
    """Write a checkpoint as a model that transformers loads.

    Example: python -m launch export runs/stage1 release/my-model --dtype bfloat16
    """
    if format_ == "gguf":
        raise UserError("--format gguf is not available yet; use --format hf")
    if format_ != "hf":
        raise UserError(f"--format {format_} is not known; use --format hf")
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype} is not known; choose from {', '.join(_DTYPES)}")
    export_model(checkpoint, dst, step=step, dtype=dtype, max_shard_size=max_shard_size)


def export_model(
    checkpoint: Path, dst: Path, *, step: int | None = None, dtype: str | None = None, max_shard_size: str = "5GB"
) -> None:
    """Writes a checkpoint as a Hugging Face directory, whole or not at all.

    Args:
      checkpoint: a run directory, or RUN/checkpoints/STEP.
      dst: must not exist, or be an empty directory.
      step: of the run; None: the newest.
      dtype: of all weights; None: each tensor's own at import, or the run's default.
      max_shard_size: of one weights file.

    Raises:
      UserError: no such checkpoint, or `dst` is occupied or cannot be written.
    """
    from tlite_jax.bridge.files import refuse_occupied
    from tlite_jax.bridge.hf import export_hf
    from tlite_jax.bridge.safetensors_io import parse_size
    from tlite_jax.checkpoint import find, load_params

    max_shard_bytes = parse_size(max_shard_size)
    refuse_occupied(dst)
    found = find(checkpoint, step)
    params = load_params(found)
    weights_dtype = cast("WeightsDtype", dtype or found.meta.weights_dtype)
    with tensor_progress(f"writing {dst}") as report:
        export_hf(
            params,
            found.meta.model,
            dst,
            found.tokenizer_dir if found.tokenizer_dir.is_dir() else None,
            weights_dtype,
            {} if dtype else found.meta.tensor_dtypes,
            max_shard_bytes,
            report,
        )
    print(f"{dst}: step {found.step} of {found.run}, weights {weights_dtype}")
