"""What a run has read: the documents of one step, and its ledger against the plan."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.config import RunConfig
    from tlite_jax.data.segments import Timeline


def replay(run: "RunConfig", step: int, *, text: bool) -> Iterator[dict[str, Any]]:
    """Yields what each row of a step's batch held, in the order of the batch.

    Args:
      run: a config; where its output is a run, that run's own segments count.
      step: from 1, as in its metrics.
      text: also the beginning of the row's text.

    Raises:
      UserError: no such step, or no buckets.
    """
    from tlite_jax.data.buckets import BucketStore
    from tlite_jax.data.replay import contents

    store = BucketStore.open(run.data.buckets)
    timeline, batch_size = timeline_of_run(run), run.train.batch_size
    last = timeline.total_rows // batch_size
    if not 1 <= step <= last:
        raise UserError(f"--replay {step}: the run has steps 1 to {last}")
    decode = _decoder(run) if text else None
    for found in contents(timeline, store, (step - 1) * batch_size, batch_size):
        bucket = store.buckets[found["bucket"]]
        yield {**found, "text": decode(bucket.read_row(found["row"]))} if decode else found


def _decoder(run: "RunConfig") -> Any:
    from tokenizers import Tokenizer

    places = [run.output / "tokenizer", *([run.data.tokenizer] if run.data.tokenizer else [])]
    for place in places:
        if (place / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
            return lambda tokens: tokenizer.decode(tokens.tolist())[:CHARACTERS].replace("\n", " ")
    raise UserError(f"--text: no tokenizer.json in {' or '.join(map(str, places))}")


CHARACTERS = 80


def timeline_of_run(run: "RunConfig") -> "Timeline":
    """The segments of the run in a config's output, else the one plan that the config makes."""
    from tlite_jax.data.mixture import make_plan
    from tlite_jax.data.segment_files import SEGMENTS_FILE, read_timeline
    from tlite_jax.data.segments import Segment, Timeline

    if (run.output / SEGMENTS_FILE).exists():
        return read_timeline(run.output, ())
    from launch.mixture_parts.infos import bucket_infos

    rows = None if run.train.steps is None else run.train.steps * run.train.batch_size
    infos, length = bucket_infos(run, declared=False), run.data.sequence_length
    plan = make_plan(run.data.mixture, infos, seed=run.seed, sequence_length=length, rows=rows)
    return Timeline((Segment(0, plan.hash),), {plan.hash: plan})


def ledger(output: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run says it has read, against the closed form of its segments.

    Raises:
      UserError: no run, or no checkpoint.
    """
    from tlite_jax.checkpoint import find
    from tlite_jax.data.segment_files import read_timeline

    checkpoint = find(output)
    timeline, row = read_timeline(output, checkpoint.meta.segments), checkpoint.meta.rows_consumed
    closed, skipped = timeline.consumed(row), timeline.skipped(row)
    rows = {bucket.name: bucket.rows for bucket in timeline.buckets}
    trained = checkpoint.meta.ledger
    return {
        "step": checkpoint.step,
        "rows": row,
        "of_rows": timeline.total_rows,
        "agrees": (trained, checkpoint.meta.skipped) == (closed, skipped),
        "segments": [vars(segment) for segment in timeline.segments],
        "buckets": [
            {
                "name": name,
                "trained_rows": count,
                "skipped_rows": checkpoint.meta.skipped.get(name, 0),
                "planned_rows": closed.get(name, 0),
                "rows": rows.get(name, 0),
                "share": count / max(row, 1),
            }
            for name, count in trained.items()
        ],
    }
