"""The schema of evaluation during a run."""

from pydantic import Field

from tlite_jax.config.base import Positive, Section


class EvaluationConfig(Section):
    """Bits per byte on held-out documents."""

    every: Positive | None = Field(default=None, description="steps; null: never during training")
    batch_size: Positive = 8
    max_tokens: Positive | None = Field(default=None, description="per bucket; null: all held-out tokens")
