"""The key-value store of a job's coordinator, through which its processes leave word for each other."""

from typing import Any


def store() -> Any:
    """Jax's client of it, for any thread; None for a process that is alone.

    jax has no public name for it; Orbax takes it from the same place.
    """
    from jax._src.distributed import global_state

    return global_state.client
