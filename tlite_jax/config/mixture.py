"""The schema of a mixture: which buckets a stage consumes, and how much of each."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from tlite_jax.config.base import NonNegativeFloat, Positive, Section


class MixtureGroup(Section):
    """The buckets that carry all of `select`'s labels, and how much of them is used."""

    select: dict[str, str] = Field(description="label -> value; {} selects every bucket not selected before")
    share: Annotated[float, Field(gt=0, le=1)] | None = Field(default=None, description="of the budget's tokens")
    epochs: NonNegativeFloat | None = Field(default=None, description="passes over each selected bucket")

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.share is None) == (self.epochs is None):
            raise ValueError("give exactly one of share and epochs")
        return self


class MixtureConfig(Section):
    """What a stage consumes. Shares need a budget; groups of epochs make one."""

    tokens: Positive | None = Field(
        default=None, description="budget; null: train.steps batches, or the groups' epochs"
    )
    groups: Annotated[tuple[MixtureGroup, ...], Field(min_length=1)] = (MixtureGroup(select={}, epochs=1.0),)

    @model_validator(mode="after")
    def _shares_or_epochs(self) -> Self:
        shares = [group.share for group in self.groups if group.share is not None]
        if shares and len(shares) != len(self.groups):
            raise ValueError("give every group a share, or every group epochs")
        if not shares and self.tokens is not None:
            raise ValueError("groups of epochs make their own budget: leave tokens out, or give shares")
        if shares and abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the groups' shares add up to {sum(shares):g}; make them add up to 1")
        return self
