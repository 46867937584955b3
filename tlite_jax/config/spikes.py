"""Spikes of the loss and of the gradient norm: how they are told, and what is done about them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tlite_jax.config.base import NonNegative, Positive, PositiveFloat, Section


def _yaml_off(value: Any) -> Any:
    """YAML reads the word off as false."""
    return "off" if value is False else value


class SpikesConfig(Section):
    """A step spikes when its loss or gradient norm lies far above the steps before it."""

    action: Annotated[Literal["off", "report", "rewind"], BeforeValidator(_yaml_off)] = Field(
        default="report", description="report: say so and write its rows down; rewind: also go back and skip them"
    )
    window: Annotated[int, Field(ge=16)] = Field(default=128, description="finite steps before it that are compared")
    loss_deviations: PositiveFloat | None = Field(
        default=8.0, description="above the window's median, in robust standard deviations; null: not looked at"
    )
    gradient_norm_deviations: PositiveFloat | None = Field(
        default=8.0, description="the same, of its logarithm; null: not looked at"
    )
    in_a_row: Positive = Field(default=3, description="rewind: spiking steps in a row that it takes")
    back: Positive = Field(default=100, description="rewind: steps before the first of them that are skipped too")
    margin: NonNegative = Field(default=100, description="rewind: steps after the last of them that are skipped too")
    max_rewinds: NonNegative = Field(
        default=3, description="after so many automatic rewinds, counted from the last by hand, the run fails instead"
    )
