"""`launch`, in a process whose devices go wrong: argv[1] says how, the rest is the command.

    python -m tests.train.flipping WHAT:CALL:PROCESS train CONFIG ...

Call CALL of the step, counted from 1, returns one changed bit in process PROCESS alone: WHAT is `state`, a parameter on
its last device, or `loss`, the metric on all of its devices.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from launch.__main__ import main
from tlite_jax.train import loop


def _flip(array: jax.Array, devices: set[jax.Device]) -> jax.Array:
    parts = []
    for shard in array.addressable_shards:
        part = np.array(shard.data)
        if shard.device in devices:
            part.reshape(-1).view(np.uint32)[0] ^= np.uint32(1)
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def _flipping(step_fn: Callable, what: str, wrong_call: int, process: int) -> Callable:
    calls = 0

    def step(state: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        state, metrics = step_fn(state, batch)
        if calls == wrong_call and process == jax.process_index():
            mine = jax.local_devices()
            if what == "loss":
                metrics = {**metrics, "loss": _flip(metrics["loss"], set(mine))}
            else:
                norm = _flip(state.params["final_norm"], {mine[-1]})
                state = state._replace(params={**state.params, "final_norm": norm})
        return state, metrics

    return step


if __name__ == "__main__":
    what, wrong_call, process = sys.argv.pop(1).split(":")
    make_step = loop.make_step
    loop.make_step = lambda *words, **named: _flipping(make_step(*words, **named), what, int(wrong_call), int(process))
    main()
