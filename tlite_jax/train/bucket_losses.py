"""The mean training loss of each bucket's tokens in a batch, from its rows' losses and the plan's arithmetic.

Shapes: B rows of a batch.
"""

from collections.abc import Mapping

import numpy as np

from tlite_jax.data.segments import Timeline


def bucket_losses(timeline: Timeline, first_row: int, rows_B2: np.ndarray) -> Mapping[str, float]:
    """Losses by the names that are logged.

    Args:
      timeline: what the run reads.
      first_row: the batch's first, a row of the run.
      rows_B2: [B, 2], of each row its summed loss in nats and its number of scored tokens.

    Returns:
      bucket_loss/NAME -> nats a token, for the buckets of which tokens were scored.
    """
    buckets = timeline.bucket_numbers(np.arange(first_row, first_row + len(rows_B2)))
    sums: dict[str, list[float]] = {}
    losses, counts = (np.bincount(buckets, weights=rows_B2[:, column]) for column in (0, 1))
    for number in np.flatnonzero(counts).tolist():
        found = sums.setdefault(timeline.buckets[number].name, [0.0, 0.0])
        found[0] += float(losses[number])
        found[1] += float(counts[number])
    return {f"bucket_loss/{name}": loss / count for name, (loss, count) in sorted(sums.items())}
