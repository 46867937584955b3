"""What a run's directory holds, for those who read it without opening the run."""

from tlite_jax.config import RunConfig
from tlite_jax.data.segments import Timeline
from tlite_jax.errors import UserError

CONFIG_FILE = "config.yaml"  # the run, resolved; marks the directory
ANOMALIES_FILE = "anomalies.jsonl"


def count_steps(config: RunConfig, timeline: Timeline) -> tuple[int, int]:
    """Batches that the config asks for, and those that there are when some are skipped.

    Raises:
      UserError: not even one.
    """
    batch_size = config.train.batch_size
    intended = config.train.steps or (timeline.total_rows + timeline.skipped_rows) // batch_size
    total = min(intended, timeline.total_rows // batch_size) if timeline.skipped_rows else intended
    if not total:
        raise UserError(
            f"the mixture has {timeline.total_rows} rows, less than a batch of {batch_size}; "
            "enlarge data.mixture or lower train.batch_size"
        )
    return intended, total
