"""What a run's evaluations say of what it forgot, against the limits that its config sets."""

from pathlib import Path
from typing import NamedTuple

from tlite_jax.checkpoint import Checkpoint
from tlite_jax.config import EvaluationConfig
from tlite_jax.config_files import parse
from tlite_jax.evaluate.groups import name_of
from tlite_jax.telemetry.metrics import read_jsonl

_METRICS = {"bits_per_byte": "bits_per_byte_delta", "kl": "kl"}


class Forgetting(NamedTuple):
    """The numbers of the last evaluation up to the step.

    Attributes:
      step: of the evaluation; None: there is none.
      limits: one line a limit.
      broken: those of them that do not hold, or were not measured.
      summary: everything together, one line.
    """

    step: int | None
    limits: list[str]
    broken: list[str]
    summary: str


def read(checkpoint: Checkpoint) -> Forgetting:
    """Compares evaluation.watch with the run's metrics, up to the checkpoint's step.

    Raises:
      UserError: metrics that cannot be read.
    """
    values = (checkpoint.meta.config or {}).get("evaluation")
    file = checkpoint.run / "metrics.jsonl"
    metrics, step = _last_board(file, checkpoint.step) if file.is_file() else ({}, None)
    watched = parse(EvaluationConfig, values, "the checkpoint's config").watch if values else ()
    limits, broken = [], []
    for watch in watched:
        key = f"{_METRICS[watch.metric]}/{name_of(watch.select)}"
        value = metrics.get(key)
        text = f"{key} {'was not measured' if value is None else f'{value:+.4f}'}, the limit is {watch.worse_by:g}"
        limits.append(text)
        if value is None or not value <= watch.worse_by:
            broken.append(text)
    everything = metrics.get("bits_per_byte_delta/all")
    summary = "the run has no evaluation" if step is None else f"evaluated at step {step}"
    if everything is not None:
        summary += f": {everything:+.4f} bits per byte against the base"
    return Forgetting(step, limits, broken, summary)


def _last_board(file: Path, step: int) -> tuple[dict[str, float], int | None]:
    """The last record with a board, not after `step`."""
    for record in reversed(read_jsonl(file)):
        if record["step"] <= step and any(key.startswith("bits_per_byte_delta/") for key in record):
            return record, int(record["step"])
    return {}, None
