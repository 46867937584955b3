"""How Orbax writes a state: its items, and the checkpointer that writes them in the background."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from tlite_jax.checkpoint.slices import save_args
from tlite_jax.checkpoint.stored import Meta
from tlite_jax.train.state import TrainState


def items(state: TrainState, meta: Meta) -> Any:
    """What a checkpoint consists of."""
    return ocp.args.Composite(
        params=ocp.args.PyTreeSave(state.params, save_args=save_args(state.params)),
        optimizer=ocp.args.PyTreeSave(state.optimizer._asdict()),
        meta=ocp.args.JsonSave(meta.model_dump(mode="json")),
    )


def together(meet: Callable[[str], object]) -> ocp.AsyncCheckpointer:
    """Of all processes into one directory; `meet` is their barrier: Orbax's would wait for one that has failed."""
    return _checkpointer(lambda *, key, timeout_ms: meet(key), ocp.options.MultiprocessingOptions(), in_background=True)


def apart() -> ocp.AsyncCheckpointer:
    """Of each process into a directory of its own: all of an ordinary checkpoint that it would write, and an index.

    Orbax counts the saves of a process, and a save of all needs equal counts: all save apart or none.
    """
    logging.getLogger("absl").addFilter(_is_news)
    own = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
    # Without its own registry it would change how all others write; the shards' shapes are in the arrays, too.
    handlers = (jax.Array, ocp.type_handlers.ArrayHandler(primary_host=None, array_metadata_store=None))
    registry = ocp.type_handlers.create_type_handler_registry(handlers)
    options = {"type_handler_registry": registry, "enable_post_merge_validation": False}  # what others write is absent
    # In the background directories are waited for through a key that all processes share: not where there are several.
    in_background = jax.process_count() == 1
    return _checkpointer(lambda *, key, timeout_ms: None, own, in_background=in_background, **options)


def _is_news(record: logging.LogRecord) -> bool:
    return "Global object size logging disabled" not in record.getMessage()  # ten times a save


def _checkpointer(
    barrier: Callable[..., Any],
    processes: ocp.options.MultiprocessingOptions,
    *,
    in_background: bool,
    **options: Any,
) -> ocp.AsyncCheckpointer:
    # Not compressed: float32 weights and moments hardly shrink, and both saving and restoring wait for it.
    arrays = {
        name: ocp.PyTreeCheckpointHandler(
            multiprocessing_options=processes,
            handler_impl=ocp.BasePyTreeCheckpointHandler(
                use_compression=False, multiprocessing_options=processes, **options
            ),
        )
        for name in ("params", "optimizer")
    }
    in_time = ocp.AsyncOptions(barrier_sync_fn=barrier, create_directories_asynchronously=in_background)
    handler = ocp.CompositeCheckpointHandler(
        **arrays,
        meta=ocp.JsonCheckpointHandler(multiprocessing_options=processes),
        composite_options=ocp.CompositeOptions(multiprocessing_options=processes, async_options=in_time),
    )
    return ocp.AsyncCheckpointer(handler, async_options=in_time, multiprocessing_options=processes)
