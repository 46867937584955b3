"""Which trackers a run's metrics go to, under which ids, and whether what that takes is there."""

import importlib.util
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlite_jax.config import RunConfig
from tlite_jax.config.trackers import MlflowConfig, WandbConfig
from tlite_jax.errors import UserError
from tlite_jax.telemetry.environment import environment
from tlite_jax.telemetry.metrics import Sink, replace_file
from tlite_jax.telemetry.trackers.link import command
from tlite_jax.telemetry.trackers.redact import without_user
from tlite_jax.telemetry.trackers.sink import TrackerSink

FILE = "trackers.json"
_URI = "MLFLOW_TRACKING_URI"


def check_trackers(config: RunConfig) -> None:
    """Raises UserError when a tracker that the config asks for is not installed or has no address."""
    telemetry = config.telemetry
    for name, section in (("wandb", telemetry.wandb), ("mlflow", telemetry.mlflow)):
        if section is not None and not _installed(name):
            raise UserError(f"telemetry.{name} needs {name!r}: pip install 'tlite_jax[{name}]'")
    if telemetry.mlflow is not None and telemetry.mlflow.tracking_uri is None and not os.environ.get(_URI):
        raise UserError(f"telemetry.mlflow.tracking_uri is not given and {_URI} is not set; give one of them")


def make_trackers(config: RunConfig, directory: Path, *, start_step: int, total_steps: int) -> list[Sink]:
    """The sinks of the trackers that a run asks for.

    Args:
      config: resolved.
      directory: of the run, which keeps the ids.
      start_step: completed steps of what is in metrics.jsonl; -1: none.
      total_steps: at which the run ends.

    Raises:
      UserError: as `check_trackers` does; trackers.json cannot be read or written.
    """
    check_trackers(config)
    telemetry = config.telemetry
    told: dict[str, Any] = {"config": {**config.model_dump(mode="json"), "environment": environment()}}
    found: list[tuple[str, WandbConfig | MlflowConfig, str]] = []
    if telemetry.wandb is not None:
        found.append(("wandb", telemetry.wandb, f"{telemetry.wandb.entity or ''}/{telemetry.wandb.project}"))
        history = str(directory / "metrics.jsonl") if telemetry.jsonl else None
        told |= {"directory": str(directory), "history": history, "start_step": start_step}
    if telemetry.mlflow is not None:
        address = telemetry.mlflow.tracking_uri or os.environ[_URI]
        found.append(("mlflow", telemetry.mlflow, f"{without_user(address)} {telemetry.mlflow.experiment}"))
    ids = _ids(directory / FILE, {name: place for name, _, place in found}) if found else {}
    sinks: list[Sink] = []
    for name, section, _ in found:
        settings = {**section.model_dump(mode="json"), **told, "id": ids[name]}
        settings["name"] = section.name or directory.resolve().name
        sinks.append(
            TrackerSink(name, command(name), settings, total_steps=total_steps, close_seconds=section.close_seconds)
        )
    return sinks


def _ids(path: Path, places: Mapping[str, str]) -> dict[str, str]:
    """Tracker -> the id of the run in its place, the one it had before or, in another place, a new one."""
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        before = {name: (entry["place"], entry["id"]) for name, entry in kept.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} does not say which runs the trackers have; delete it to begin new ones") from error
    ids = {}
    for name, place in places.items():
        known = before.get(name)
        ids[name] = known[1] if known is not None and known[0] == place else secrets.token_hex(8)
    now = {**kept, **{name: {"place": place, "id": ids[name]} for name, place in places.items()}}
    if now != kept:
        try:
            replace_file(path, json.dumps(now, indent=1).encode() + b"\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another output") from error
    return ids


def _installed(module: str) -> bool:
    """Whether there is a package; a directory of that name, which W&B leaves where it runs, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None
