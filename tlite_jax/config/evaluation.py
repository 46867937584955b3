"""The schema of evaluation during a run: what is measured, what is watched, and which step is the best."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from tlite_jax.config.base import NonNegative, Positive, PositiveFloat, Section

Weight = Annotated[float, Field(allow_inf_nan=False)]


class KLConfig(Section):
    """KL(base || now) on a fixed sample of held-out text."""

    tokens: Positive = Field(description="of text in all, taken evenly from the buckets")
    top_k: Positive = Field(default=128, description="of the base's next tokens that are kept; the rest is one mass")
    select: dict[str, str] = Field(default={}, description="label -> value of the held-out buckets; {}: all")


class WatchConfig(Section):
    """An alert when held-out text gets worse than it was under the base."""

    select: dict[str, str] = Field(description="label -> value; {}: everything that is trained on")
    metric: Literal["bits_per_byte", "kl"] = Field(
        default="bits_per_byte", description="bits_per_byte: above the base's by; kl: nats a token from the base"
    )
    worse_by: PositiveFloat
    action: Literal["log", "stop"] = Field(default="log", description="stop: save a checkpoint and end the run")


class TasksConfig(Section):
    """Tasks of lm-evaluation-harness while training; needs the extra `eval`."""

    names: Annotated[tuple[str, ...], Field(min_length=1)] = Field(description="as for launch eval --tasks")
    every: Positive | None = Field(default=None, description="steps, a multiple of evaluation.every; null: that")
    limit: Positive | None = Field(default=None, description="documents of each task; null: all")
    num_fewshot: NonNegative | None = Field(default=None, description="null: each task's own")
    include_path: Path | None = Field(default=None, description="directory of task YAML files")


class Term(NamedTuple):
    """One part of an objective: a metric of the text that labels select."""

    metric: Literal["bits_per_byte", "delta", "kl"]
    select: dict[str, str]


class BestConfig(Section):
    """Which step is the best: the one with the smallest weighted sum."""

    objective: Annotated[dict[str, Weight], Field(min_length=1)] = Field(
        description="[delta:|kl:]label=value[,label=value] or all -> weight; bits per byte, unless a metric is named"
    )

    @field_validator("objective")
    @classmethod
    def _terms_are_terms(cls, objective: dict[str, float]) -> dict[str, float]:
        for term in objective:
            parse_term(term)
        return objective

    def terms(self) -> list[tuple[Term, float]]:
        """Each part and its weight."""
        return [(parse_term(term), weight) for term, weight in self.objective.items()]


class EvaluationConfig(Section):
    """Bits per byte on held-out documents, divergence from the base, alerts, the best step and samples of text."""

    every: Positive | None = Field(default=None, description="steps; null: never during training")
    batch_size: Positive = 8
    max_tokens: Positive | None = Field(default=None, description="per bucket; null: all held-out tokens")
    max_bytes: Positive | None = Field(
        default=None, description="per bucket; chooses the same documents whatever the tokenizer"
    )
    base: Path | None = Field(
        default=None, description="the checkpoint to compare with; null: the one that the first of the stages began as"
    )
    kl: KLConfig | None = Field(default=None, description="null: not measured")
    watch: tuple[WatchConfig, ...] = ()
    best: BestConfig | None = Field(default=None, description="null: checkpoints are kept by their age only")
    tasks: TasksConfig | None = Field(default=None, description="null: none are run")
    samples: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="prompts that the model goes on with at each evaluation, greedily"
    )
    sample_tokens: Positive = Field(default=64, description="of each continuation, at most")

    @model_validator(mode="after")
    def _asks_for_what_is_measured(self) -> Self:
        if self.every is None and (self.watch or self.best or self.kl or self.tasks or self.samples):
            raise ValueError("kl, watch, best, tasks and samples need evaluation: give every")
        if self.tasks and self.tasks.every and self.every and self.tasks.every % self.every:
            raise ValueError(f"tasks.every {self.tasks.every} is not a multiple of every {self.every}")
        uses = [f"watch[{number}]" for number, watch in enumerate(self.watch) if watch.metric == "kl"]
        if self.best is not None:
            uses += [f"best.objective {name!r}" for name in self.best.objective if parse_term(name).metric == "kl"]
        if uses and self.kl is None:
            raise ValueError(f"{uses[0]} needs KL(base || now), which is not measured: give kl.tokens")
        return self


def parse_term(text: str) -> Term:
    """Reads "language=ru", "delta:language=en", "kl:source=wiki,domain=law" or "all".

    Raises:
      ValueError: what it should have been.
    """
    found = re.fullmatch(r"(?:(bits_per_byte|delta|kl):)?(.*)", text, re.DOTALL)
    assert found is not None
    metric: Any
    metric, labels = found.groups()
    pairs = [] if labels == "all" else [part.partition("=") for part in labels.split(",")]
    if not all(label and equals and value for label, equals, value in pairs):
        raise ValueError(
            f"{text!r} is not a term: write label=value, several joined by commas, or all; "
            "with delta: or kl: before it for what it has got worse than the base by"
        )
    return Term(metric or "bits_per_byte", {label.strip(): value.strip() for label, _, value in pairs})
