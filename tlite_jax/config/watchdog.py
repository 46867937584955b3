"""How long each part of a start may take before the watchdog ends it."""

from typing import Annotated

from pydantic import Field

from tlite_jax.config.base import PositiveFloat, Section


class WatchdogConfig(Section):
    """Limits in seconds; what takes longer is stuck, and a restart costs less than waiting."""

    enabled: bool = True
    init: PositiveFloat = Field(default=1800.0, description="opening the run and finding its checkpoint")
    restore: PositiveFloat = Field(default=3600.0, description="reading the state")
    compile: PositiveFloat = Field(default=3600.0, description="the first steps, compilation included")
    step_floor: PositiveFloat = Field(
        default=300.0, description="the least limit of a step and of waiting for its batch"
    )
    step_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = Field(
        default=3.0, description="times the 99th percentile of recent steps, where that is more than step_floor"
    )
    checkpoint: PositiveFloat = Field(default=3600.0, description="one save, as far as training waits for it")
    evaluation: PositiveFloat = Field(default=7200.0, description="one evaluation")
    other: PositiveFloat = Field(default=1800.0, description="what is in none of these")
