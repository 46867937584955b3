"""The schema of a mixture: which buckets a stage consumes, and how much of each."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from tlite_jax.config.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section
from tlite_jax.config.pattern import OncePerPattern, PatternKey

Share = Annotated[float, Field(gt=0, le=1)]


class MixtureGroup(Section):
    """The buckets that carry all of `select`'s labels, and how much of them is used."""

    select: dict[str, str] = Field(description="label -> value; {} selects every bucket not selected before")
    share: Share | None = Field(default=None, description="of the budget's tokens")
    epochs: NonNegativeFloat | None = Field(default=None, description="passes over each selected bucket")

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.share is None) == (self.epochs is None):
            raise ValueError("give exactly one of share and epochs")
        return self


class BalanceConfig(Section):
    """Evens out the values of a label inside a selection, whose weight as a whole stays."""

    by: str = Field(description="the label whose values are balanced")
    alpha: Fraction = Field(description="weight of a value ~ (its natural weight) ** alpha; 0: equal, 1: as it was")
    max_rate: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = Field(
        default=None, description="no value is raised above this multiple of its natural weight"
    )


class DeclaredBucket(Section):
    """A bucket that need not exist: its size, for planning a mixture before the data is there."""

    labels: Annotated[dict[str, str], Field(min_length=1)]
    tokens: Positive
    documents: NonNegative | None = None
    name: str | None = Field(default=None, description="null: the labels' values, joined by dots")


class MixtureConfig(Section):
    """What a stage consumes: a budget, what weighs how much, and which shares must come out.

    Keys of `targets`, `rates`, `balance` and `max_epochs` are patterns over labels. `groups` is the short form for
    selections that do not overlap; it stands alone.
    """

    tokens: Positive | None = Field(default=None, description="budget; null: epochs, train.steps batches, or groups'")
    epochs: PositiveFloat | None = Field(default=None, description="budget, in passes over all buckets at their rates")
    targets: Annotated[dict[PatternKey, Share], OncePerPattern] = Field(
        default={}, description="pattern -> share of the budget; may overlap"
    )
    rates: Annotated[dict[PatternKey, NonNegativeFloat], OncePerPattern] = Field(
        default={}, description="pattern -> factor on the natural weight; all that match multiply"
    )
    balance: Annotated[dict[PatternKey, BalanceConfig], OncePerPattern] = Field(
        default={}, description="pattern -> label to balance, after the rates"
    )
    max_epochs: Annotated[dict[PatternKey, PositiveFloat], OncePerPattern] = Field(
        default={}, description="pattern -> most passes over each bucket; the least that matches holds"
    )
    groups: Annotated[tuple[MixtureGroup, ...], Field(min_length=1)] | None = Field(
        default=None, description="every group a share, or every group epochs"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.tokens is not None and self.epochs is not None:
            raise ValueError("tokens and epochs are both budgets: leave one out")
        if self.groups is not None:
            others = ("epochs", "targets", "rates", "balance", "max_epochs")
            if given := [name for name in others if getattr(self, name)]:
                raise ValueError(f"groups stand alone: leave {', '.join(given)} out, or write the groups as targets")
        return self

    @model_validator(mode="after")
    def _shares_or_epochs(self) -> Self:
        if self.groups is None:
            return self
        shares = [group.share for group in self.groups if group.share is not None]
        if shares and len(shares) != len(self.groups):
            raise ValueError("give every group a share, or every group epochs")
        if not shares and self.tokens is not None:
            raise ValueError("groups of epochs make their own budget: leave tokens out, or give shares")
        if shares and abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the groups' shares add up to {sum(shares):g}; make them add up to 1")
        return self
