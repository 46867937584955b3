"""Writing a model without optimizer, as a run to start from."""

import contextlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from tlite_jax.checkpoint.array_files import write_arrays
from tlite_jax.checkpoint.peers import alone
from tlite_jax.checkpoint.seal import PARTIAL, publish
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
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(use_ocdbt=False), meta=ocp.JsonCheckpointHandler()
    )
    logging.getLogger("absl").addFilter(_is_news)
    with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
        checkpointer.save(
            partial,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(empty), meta=ocp.args.JsonSave(meta.model_dump(mode="json"))
            ),
        )
    for array in partial.glob("params/*/"):
        shutil.rmtree(array)
    entries = write_arrays(partial / "params", params, report)
    publish(partial, final, alone(), written={f"params/{name}": entry for name, entry in entries.items()})


def _is_news(record: logging.LogRecord) -> bool:
    return "Skipping merge of OCDBT" not in record.getMessage()  # there are none, as asked
