"""Writing a model without optimizer, as a run to start from."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from tlite_jax.checkpoint.peers import alone
from tlite_jax.checkpoint.seal import PARTIAL, publish
from tlite_jax.checkpoint.slices import write_arrays
from tlite_jax.checkpoint.stored import Meta
from tlite_jax.config import ModelConfig


def save_model(
    run: Path,
    params: Any,
    model: ModelConfig,
    *,
    weights_dtype: Literal["bfloat16", "float16", "float32"],
    origin: str,
    tensor_dtypes: dict[str, str] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a model without optimizer as step 0 of a run; the tokenizer is the caller's to place beside it.

    Args:
      run: directory; made if absent.
      params: nested dict of arrays, logical shapes, any float dtype; read in slices, so that they may lie anywhere.
      model: their shape.
      weights_dtype: the dtype that `export` writes by default.
      origin: where they came from, for people.
      tensor_dtypes: Hugging Face names of tensors whose dtype differs from weights_dtype.
      report: called with (bytes written, bytes in all).
    """
    meta = Meta(step=0, model=model, weights_dtype=weights_dtype, origin=origin, tensor_dtypes=tensor_dtypes or {})
    final = run.absolute() / "checkpoints" / "0"
    partial = final.with_name(f"0{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    # Orbax writes the tree, and an empty array for each leaf; its record of the tree holds no shapes.
    empty = jax.tree.map(lambda leaf: np.zeros((), leaf.dtype), params)
    with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as checkpointer:
        checkpointer.save(
            partial,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(empty), meta=ocp.args.JsonSave(meta.model_dump(mode="json"))
            ),
        )
    for arrays in (*partial.glob("params/*ocdbt*"), partial / "params" / "d"):
        shutil.rmtree(arrays) if arrays.is_dir() else arrays.unlink()
    write_arrays(partial / "params", params, report)
    publish(partial, final, alone())
