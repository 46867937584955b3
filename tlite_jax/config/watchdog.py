"""How long each part of a start may take before the watchdog ends it, and when a process counts as slow."""

from typing import Annotated

from pydantic import Field

from tlite_jax.config.base import NonNegative, PositiveFloat, Section

_MoreThanOne = Annotated[float, Field(gt=1, allow_inf_nan=False)]


class WatchdogConfig(Section):
    """Limits in seconds; what takes longer is stuck, and a restart costs less than waiting."""

    enabled: bool = True
    join: PositiveFloat = Field(default=300.0, description="for all processes of the job to come")
    init: PositiveFloat = Field(default=1800.0, description="opening the run and finding its checkpoint")
    restore: PositiveFloat = Field(default=3600.0, description="reading the state")
    compile: PositiveFloat = Field(default=3600.0, description="the first steps, compilation included")
    step_floor: PositiveFloat = Field(
        default=300.0, description="the least limit of a step and of waiting for its batch"
    )
    step_factor: _MoreThanOne = Field(
        default=3.0, description="times the 99th percentile of recent steps, where that is more than step_floor"
    )
    checkpoint: PositiveFloat = Field(default=3600.0, description="one save, as far as training waits for it")
    evaluation: PositiveFloat = Field(default=7200.0, description="one evaluation")
    other: PositiveFloat = Field(default=1800.0, description="what is in none of these")
    pace_every: NonNegative = Field(
        default=50, description="steps after which processes compare their pace; 0: they never do"
    )
    slow_ratio: _MoreThanOne = Field(
        default=1.2, description="times the others' time for a step, from which a process is reported as slow"
    )
