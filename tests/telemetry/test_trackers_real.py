"""W&B and MLflow themselves, without a network: what they hold of a run is what metrics.jsonl says.

`make test-trackers` installs them; elsewhere these tests are skipped. TLITE_MLFLOW_SERVER=http://HOST:PORT names a
server (`mlflow server`, of a full mlflow) to log to as well.
"""

import importlib.util
import json
import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tlite_jax.config_files import override
from tlite_jax.telemetry.metrics import read_jsonl
from tlite_jax.telemetry.trackers.mlflow_names import decoded
from tlite_jax.telemetry.trackers.setup import FILE

_BLOCK, _HEADER = 32768, 7


def needs(module: str) -> pytest.MarkDecorator:
    spec = importlib.util.find_spec(module)
    return pytest.mark.skipif(spec is None or spec.origin is None, reason=f"{module} is not installed")


def two_starts(directory: Path, telemetry: str) -> list[dict[str, float]]:
    """A run of 6 steps in two starts; returns what metrics.jsonl has, but the times."""
    asked = tiny.config(directory, *tiny.from_imported(), *tiny.LONGER, telemetry)
    for steps in (3, 6):
        tiny.start(override(asked, [f"train.steps={steps}"]))
    return [
        {name: value for name, value in record.items() if name != "time"}
        for record in read_jsonl(directory / "metrics.jsonl")
    ]


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file, which is a log of LevelDB (doc/log_format.md) after a header of 7 bytes."""
    data, place, parts = path.read_bytes(), 7, b""
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        parts += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):  # the whole of a record, or its end
            yield parts
            parts = b""


def history(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The id and the logged values of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    run_id, rows = "", []
    for content in records(path):
        record = Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
        elif kind == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return run_id, rows


@needs("wandb")
def test_the_newest_offline_run_of_wandb_holds_both_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    lines = two_starts(tmp_path / "run", "telemetry.wandb={project: p, mode: offline}")
    assert "warning:" not in capfd.readouterr().err
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2
    (_, first), (run_id, both) = map(history, files)
    assert run_id == json.loads((tmp_path / "run" / FILE).read_text())["wandb"]["id"]
    assert first == lines[:3]
    assert both == lines


@needs("mlflow")
@pytest.mark.parametrize("store", ["directory", "server"])
def test_mlflow_holds_both_starts_in_one_run(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    place = (tmp_path / "mlruns").as_uri() if store == "directory" else os.environ.get("TLITE_MLFLOW_SERVER")
    if place is None:
        pytest.skip("TLITE_MLFLOW_SERVER names no server")
    name = f"a-{uuid.uuid4()}"
    lines = two_starts(tmp_path / "run", f"telemetry.mlflow={{experiment: {name}, tracking_uri: '{place}'}}")
    assert "warning:" not in capfd.readouterr().err
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=place)
    experiment = client.get_experiment_by_name(name)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.learning_rate"] == "0.01"
    found: dict[int, dict[str, float]] = {line["step"]: {"step": line["step"]} for line in lines}
    for metric in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, metric):
            found[point.step][decoded(metric)] = point.value
    assert list(found.values()) == lines
