"""Jobs of two processes that meet bad rows and go back before them by themselves: do they agree, to the same bits?

    python -m tests.faults.spikes --count 10 --seed 1

Two batches at a random place multiply the loss and spoil a parameter. The job must go back before them and end with the
bits of one that met them too and was rewound by hand.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests import tiny
from tests.faults import ranks, report, runs
from tlite_jax.config import RunConfig
from tlite_jax.config_files import save_config
from tlite_jax.data.buckets import BucketStore
from tlite_jax.data.loader import RowSource
from tlite_jax.data.mixture import make_plan
from tlite_jax.train import loop
from tlite_jax.train.rewind import count_automatic, rewind

PROCESSES, STEPS, IN_A_ROW, BACK, MARGIN = 2, 32, 2, 5, 1


def try_once(data: Path, scratch: Path, chance: np.random.Generator) -> dict[str, Any]:
    """One place; returns where it was.

    Raises:
      AssertionError: a job did not end well, or with other bits.
    """
    first, every = int(chance.integers(18, STEPS - 4)), int(chance.integers(2, 8))
    skip = first - BACK + 1, first + IN_A_ROW - 1 + MARGIN
    by_hand = _config(data, scratch / "by_hand", scratch, every, "off")
    alone = _config(data, scratch / "alone", scratch, every, "rewind")
    bad = _fingerprints(by_hand, first)
    for config in (by_hand, alone):
        _job(config, scratch, bad)
    rewind(by_hand.output, to=first - BACK, skip=skip)
    _job(by_hand, scratch, bad)
    assert count_automatic(alone.output) == 1, "it did not go back by itself"
    found, expected = (_outcome(config.output, scratch) for config in (alone, by_hand))
    wrong = [name for name, value in expected.items() if found[name] != value]
    assert not wrong, f"bad rows at step {first}, saves every {every}: other {wrong}"
    assert sum(found["rows"]["skipped"].values()) == (skip[1] - skip[0] + 1) * tiny.BATCH_SIZE
    for config in (by_hand, alone):
        shutil.rmtree(config.output)
    return {"bad_steps": [first, first + IN_A_ROW - 1], "save_every": every}


def _config(data: Path, output: Path, scratch: Path, every: int, action: str) -> RunConfig:
    spikes = {"action": action, "window": 16, "in_a_row": IN_A_ROW, "back": BACK, "margin": MARGIN}
    train = {"steps": STEPS, "batch_size": tiny.BATCH_SIZE}
    checkpoint = {"every": every, "keep_latest": STEPS}
    config = runs.config(
        data,
        output,
        scratch / "cache",
        train={**train, "spikes": {**spikes, "gradient_norm_deviations": None}},
        checkpoint=checkpoint,
    )
    mixture = config.data.mixture.model_copy(update={"tokens": STEPS * tiny.BATCH_SIZE * tiny.LENGTH})
    return config.model_copy(update={"data": config.data.model_copy(update={"mixture": mixture})})


def _job(config: RunConfig, scratch: Path, bad: set[int]) -> None:
    """Trains in forked processes of one device each."""
    save_config(config, scratch / "run.yaml")
    make_step = loop.make_step
    loop.make_step = lambda *words, **named: _poisoned(make_step(*words, **named), bad)
    try:
        job = ranks.Job(scratch / "run.yaml", scratch, PROCESSES)
    finally:
        loop.make_step = make_step
    try:
        statuses = job.wait(ranks.START_SECONDS)
        assert statuses == [0] * PROCESSES, f"{config.output.name}: {statuses}\n{job.said()}"
    finally:
        job.end()


def _poisoned(step_fn: Callable, bad: set[int]) -> Callable:
    """The step, which some batches spoil; they are told by a sum of their tokens, the same on all processes."""
    sum_of = jax.jit(_fingerprint)

    def step(state: Any, batch: Any) -> Any:
        poison = int(sum_of(batch["tokens"])) in bad
        state, metrics = step_fn(state, batch)
        if poison:
            norm = state.params["final_norm"]
            spoilt = jax.jit(lambda values: values * 1.5, out_shardings=norm.sharding)(norm)
            state = state._replace(params={**state.params, "final_norm": spoilt})
        return state, {**metrics, "loss": metrics["loss"] * (10 if poison else 1)}

    return step


def _fingerprint(tokens: Any) -> Any:
    """A number that tells a batch from others; of numpy's arrays and jax's."""
    place = np.arange(1, tokens.size + 1, dtype=np.int32).reshape(tokens.shape) % 1013
    return (tokens * place).sum()


def _fingerprints(config: RunConfig, first: int) -> set[int]:
    """Of the bad batches, from a step of the run on."""
    store, size = BucketStore.open(config.data.buckets), tiny.BATCH_SIZE
    infos = store.infos()
    reached = {info.name: 0 for info in infos}
    plan = make_plan(
        config.data.mixture, infos, seed=config.seed, sequence_length=tiny.LENGTH, rows=STEPS * size, reached=reached
    )
    source = RowSource(plan, store, document_masking=False)
    batches = (source.read(np.arange((step - 1) * size, step * size)) for step in range(first, first + IN_A_ROW))
    return {int(_fingerprint(batch["tokens"])) for batch in batches}


def _outcome(output: Path, scratch: Path) -> dict[str, Any]:
    """Losses, the last state's bits and the rows read, found out in a child."""
    file = scratch / "outcome.json"

    def find_out() -> None:
        jax.config.update("jax_num_cpu_devices", PROCESSES)
        file.write_text(json.dumps(runs.outcome(output, tiny.mesh(1, PROCESSES))))

    child = runs.Child(find_out, scratch / "outcome.log")
    assert child.wait() == 0, child.log.read_text()
    return json.loads(file.read_text())


def main() -> None:
    """Tries places and prints a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tlite-spikes-") as scratch:
        data = runs.make_data(Path(scratch) / "data")
        for number in range(arguments.count):
            found = try_once(data, Path(scratch), np.random.default_rng([arguments.seed, number]))
            report.tell()
            print(json.dumps({"number": number, **found}), flush=True)
    print(
        f"{arguments.count} of {arguments.count} jobs of {PROCESSES} processes went back before bad rows, to the bits "
        f"of one rewound by hand; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
