"""Planning and finding rows at full size: 2,000 buckets of log-normal sizes, targets on crossing labels."""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tlite_jax.config import MixtureConfig
from tlite_jax.data.mixture import BucketInfo, Plan, make_plan

ROOT = Path(__file__).resolve().parent.parent
NUM_BUCKETS, BATCH_SIZE = 2000, 768
# Name -> (tokens, tokens of a row, row at which a run goes on).
SCALES = {
    "300B": (300_000_000_000, 8192, 36_000_000),
    "10T": (10_000_000_000_000, 8192, 1_000_000_000),
    "10T, rows of 2048": (10_000_000_000_000, 2048, 4_000_000_000),
}
LABELS = {
    "language": {"ru": 0.5, "en": 0.3, "code": 0.2},
    "domain": {"science": 0.1, "law": 0.2, "fiction": 0.4, "other": 0.3},
    "style": {"article": 0.3, "news": 0.4, "forum": 0.3},
}
MIXTURE = {
    "targets": {"language=ru": 0.85, "language=en": 0.1, "domain=science": 0.2, "style=article": 0.5},
    "rates": {"style=forum": 0.25, "style=news, domain=other": 0.05},
    "max_epochs": {"all": 400.0},
}


def make_buckets(total_rows: int, num_buckets: int = NUM_BUCKETS, seed: int = 0) -> list[BucketInfo]:
    """Buckets of log-normal sizes that add up to about `total_rows`, with three labels each."""
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(0, 2.5, num_buckets)
    rows = np.maximum(1, sizes / sizes.sum() * total_rows).astype(np.int64)
    labels = {name: rng.choice(list(p), num_buckets, p=list(p.values())) for name, p in LABELS.items()}
    return [
        BucketInfo(f"bucket{i}", {name: str(values[i]) for name, values in labels.items()}, int(rows[i]))
        for i in range(num_buckets)
    ]


def build(tokens: int, sequence_length: int, num_buckets: int = NUM_BUCKETS) -> Plan:
    """The plan of a mixture as large as the data."""
    buckets = make_buckets(tokens // sequence_length, num_buckets)
    mixture = MixtureConfig.model_validate({"tokens": tokens, **MIXTURE})
    return make_plan(mixture, buckets, seed=1, sequence_length=sequence_length, rows=None)


def measure(*, repeats: int = 3, scales: tuple[str, ...] = tuple(SCALES)) -> dict[str, dict[str, Any]]:
    """Times each scale in processes of their own, in turns.

    Returns:
      Scale -> medians: plan_seconds (from bucket sizes to a plan), first_batch_seconds (to locate the first 768 rows
      from JSON, as a run that goes on does), rows_per_second (located after that), memory_bytes (of building the plan
      and locating, beyond what the imports take).
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in scales}
    for _ in range(repeats):
        for name in scales:
            found[name].append(_in_process(name))
    return {
        name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} for name, turns in found.items()
    }


def measure_command(*, num_buckets: int = NUM_BUCKETS, repeats: int = 3) -> float:
    """Median seconds of `python -m launch mixture` on a config that declares buckets, start of Python included."""
    import tempfile

    import yaml

    values: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "tlite_8b_stage1.yaml").read_text(encoding="utf-8"))
    declared = [
        {"labels": dict(b.labels), "tokens": b.rows * 8192, "name": b.name}
        for b in make_buckets(36_621_094, num_buckets)
    ]
    values["data"] |= {"declared": declared, "mixture": {"tokens": 300_000_000_000, **MIXTURE}}
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "config.yaml"
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            command = [sys.executable, "-m", "launch", "mixture", str(config)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _in_process(scale: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench._data_mixture", scale]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _measure_here(scale: str) -> dict[str, float]:
    tokens, sequence_length, row = SCALES[scale]
    make_plan(
        MixtureConfig(epochs=1.0, targets={"a=1": 0.5}),
        [BucketInfo("x", {"a": "1"}, 1), BucketInfo("y", {}, 1)],
        seed=0,
        sequence_length=1,
        rows=None,
    )  # imports the solver
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    plan = build(tokens, sequence_length)
    built = time.perf_counter()
    text = plan.to_json()
    resumed = time.perf_counter()
    again = Plan.from_json(text)
    again.locate(np.arange(row, row + BATCH_SIZE))
    located = time.perf_counter()
    for start in range(row, row + 20 * BATCH_SIZE, BATCH_SIZE):
        again.locate(np.arange(start, start + BATCH_SIZE))
    ended = time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "plan_seconds": built - started,
        "first_batch_seconds": located - resumed,
        "rows_per_second": 20 * BATCH_SIZE / (ended - located),
        "memory_bytes": used * 1024,
    }


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1])))
