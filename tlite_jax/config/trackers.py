"""Experiment trackers that metrics are also sent to. Keys and passwords come from the environment only."""

import re
from typing import Annotated, Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, model_validator

from tlite_jax.config.base import PositiveFloat, Section

Name = Annotated[str, Field(min_length=1)]
_SECRET = re.compile(r"key|token|secret|passw|pwd|credential|signature|\bsig\b", re.IGNORECASE)
CloseSeconds = Annotated[
    PositiveFloat, Field(description="how long the end of a start waits for what has not been sent yet")
]


class WandbConfig(Section):
    """A run of Weights & Biases; needs the extra `wandb`. The key is WANDB_API_KEY, or what `wandb login` has kept."""

    project: Name
    entity: Name | None = Field(default=None, description="a user or a team; null: the default one of the key")
    name: Name | None = Field(default=None, description="null: the name of the run's directory")
    group: Name | None = None
    tags: tuple[Name, ...] = ()
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: files in OUTPUT/wandb, for `wandb sync`"
    )
    close_seconds: CloseSeconds = 30.0


class MlflowConfig(Section):
    """A run of MLflow; needs the extra `mlflow`. Keys are MLFLOW_TRACKING_TOKEN, or _USERNAME and _PASSWORD."""

    experiment: Name
    tracking_uri: Name | None = Field(default=None, description="null: what MLFLOW_TRACKING_URI says")
    name: Name | None = Field(default=None, description="null: the name of the run's directory")
    tags: dict[Name, str] = Field(default_factory=dict)
    close_seconds: CloseSeconds = 30.0

    # Of the whole section, so that the error does not repeat the address.
    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        if self.tracking_uri is not None and holds_secret(self.tracking_uri):
            raise ValueError(
                "tracking_uri holds a user, a password or a key, and a config is saved: leave it out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        return self


def holds_secret(address: str) -> bool:
    """Whether an address has a user or a password in it, or an argument that is named like one."""
    parts = urlsplit(address)
    return "@" in parts.netloc or any(_SECRET.search(name) for name, _ in parse_qsl(parts.query, True))
