"""A run's directory as training would leave it, written in a moment."""

import json
from pathlib import Path

import numpy as np

from tlite_jax.config_files import load_config
from tlite_jax.data.order import Plan, PlannedBucket
from tlite_jax.data.segment_files import write_timeline
from tlite_jax.data.segments import Segment, Timeline
from tlite_jax.telemetry.goodput import Stopwatch
from tlite_jax.telemetry.metrics import JsonlSink, MetricsWriter

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("language=ru", "language=en", 'domain=<code> & "co"')


def write_run(directory: Path, *, steps: int = 1000, every: int = 100, total: int = 1200) -> Path:
    """A run of two starts that has logged `steps` steps and was evaluated every so often."""
    directory.mkdir(parents=True)
    text = (REPOSITORY / "configs" / "tiny.yaml").read_text(encoding="utf-8")
    (directory / "config.yaml").write_text(text.replace("steps: 60", f"steps: {total}"), encoding="utf-8")
    batch_size = load_config(directory / "config.yaml").train.batch_size
    tokens = batch_size * 256
    write_plan(directory, batch_size, total)
    random = np.random.default_rng(0)
    with MetricsWriter([JsonlSink(directory / "metrics.jsonl")]) as writer:
        for step in range(steps + 1):
            values: dict[str, float] = {}
            if step:
                loss = 2 + 2 * np.exp(-step / 200) + 0.1 * random.standard_normal()
                values = {"loss": loss, "gradient_norm": 1 + random.random(), "learning_rate": 1e-5}
                values |= {"tokens_per_second": 3e5, "tokens_per_second_per_device": 3e3, "mfu": 0.59}
                values |= {"mfu_causal": 0.52, "tokens_seen": step * tokens}
            if step % every == 0:
                done = step / steps
                for number, name in enumerate(NAMES):
                    delta = done * (-0.2, 0.03, 0.01)[number]
                    values |= {f"bits_per_byte/{name}": 1 + delta, f"bits_per_byte_delta/{name}": delta}
                    values |= {f"kl/{name}": 0.1 * done * number}
                values |= {"alert/bits_per_byte/language=en": float(done > 0.7), "objective": 1 - 0.2 * done}
            writer.write(step, values)
    write_starts(directory / "goodput.jsonl", steps)
    return directory


def write_starts(path: Path, steps: int) -> None:
    """Half the steps and some more, killed; then the rest."""
    now = 0.0

    def clock() -> float:
        return now

    def calendar() -> float:
        return 1.8e9 + now

    half = steps // 2
    environment = {"jax": "0.10.2", "devices": "96 x A100", "mesh": {"replica": 12, "fsdp": 8}}
    for first, last, status in ((0, half + 20, None), (half, steps, "done")):
        spent = {"init": 20.0, "restore": 30.0 if first else 0.0, "compile": 40.0}
        stopwatch = Stopwatch(path, first, environment, spent=spent, clock=clock, calendar=calendar)
        for step in range(first, last):
            for section, seconds in (("step", 20.0), ("data_wait", 0.1), ("checkpoint", 0.05)):
                now += seconds
                stopwatch.add(section, seconds)
            stopwatch.reached(step + 1)
        if status:
            stopwatch.close(status)
        now += 300


def write_plan(directory: Path, batch_size: int, total: int) -> None:
    """A plan of 1200 batches over four buckets, one of them all but empty."""
    buckets = (
        ("web", "ru", 4000, 60),
        ("books", "ru", 1000, 25),
        ("<wiki>", "en", 9000, 14.99),
        ("rest", "en", 10, 0.01),
    )
    rows = total * batch_size
    planned = tuple(
        PlannedBucket(name, {"language": language}, there, round(rows * share / 100), "")
        for name, language, there, share in buckets
    )
    plan = Plan((planned,), 0, 256)
    write_timeline(directory, Timeline((Segment(0, plan.hash),), {plan.hash: plan}))


def read_lines(path: Path) -> list[dict]:
    """Of JSON."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
