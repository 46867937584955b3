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
from tlite_jax.telemetry.stragglers import FILE, Finding

REPOSITORY = Path(__file__).resolve().parents[2]
GROUPS = ("attention.0", "attention.1", "embedding", "head", "mlp.0", "mlp.1", "norms")
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
                values |= {f"bucket_loss/{name}": loss + number for number, name in enumerate(("web", "books"))}
            if step and step % 20 == 0:
                values |= {"bucket_loss/<wiki>": loss - 1, "bucket_loss/rest": np.nan}
            if step and step % 50 == 0:
                for number, group in enumerate(GROUPS, 1):
                    values |= {f"group_gradient_norm/{group}": 0.1 * number, f"group_update_norm/{group}": 1e-4}
                    values |= {f"group_parameter_norm/{group}": float(number)}
            if step % every == 0:
                done = step / steps
                for number, name in enumerate(NAMES):
                    delta = done * (-0.2, 0.03, 0.01)[number]
                    values |= {f"bits_per_byte/{name}": 1 + delta, f"bits_per_byte_delta/{name}": delta}
                    values |= {f"kl/{name}": 0.1 * done * number}
                values |= {"alert/bits_per_byte/language=en": float(done > 0.7), "objective": 1 - 0.2 * done}
            writer.write(step, values)
    write_starts(directory / "goodput.jsonl", steps)
    slow = Finding(3, "<n3>", True, 1.42, 0.8, 0.1, 1.0, 0.0, 0.6)
    findings = (slow, slow._replace(process=5, device_ratio=1.3, data_wait=0.0), slow._replace(slow=False))
    with (directory / FILE).open("w", encoding="utf-8") as file:
        for number, finding in enumerate(findings, 1):
            line = {"step": 100 * number, "time": 1.8e9 + number, **finding._asdict(), "text": finding.text()}
            file.write(json.dumps(line) + "\n")
        file.write('{"step": 400, "ti')
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
