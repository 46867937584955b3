"""Trackers of a run: what is refused, which ids are kept, what arrives. Libraries are stand-ins, processes are real."""

import json
import os
import posixpath
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tlite_jax.config import RunConfig
from tlite_jax.config_files import override, parse
from tlite_jax.errors import UserError
from tlite_jax.telemetry.metrics import read_jsonl
from tlite_jax.telemetry.trackers import setup
from tlite_jax.telemetry.trackers.link import command
from tlite_jax.telemetry.trackers.mlflow_names import decoded, encoded
from tlite_jax.telemetry.trackers.redact import one_line
from tlite_jax.telemetry.trackers.setup import check_trackers, make_trackers
from tlite_jax.telemetry.trackers.sink import TrackerSink

STAND_INS = Path(__file__).parent / "stand_ins"
KEY = "a-key-that-nobody-may-see"


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both libraries' stand-ins are installed; returns where that of W&B keeps its runs."""
    (tmp_path / "wandb-runs").mkdir()
    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    monkeypatch.setenv("TLITE_STAND_IN", str(tmp_path / "wandb-runs"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", KEY)
    return tmp_path / "wandb-runs"


def config(directory: Path, *words: str) -> RunConfig:
    return override(parse(RunConfig, tiny.values(directory, directory / "run"), "test"), words)


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1))
def test_every_name_is_one_that_mlflow_takes_and_comes_back(name: str) -> None:
    found = encoded(name)
    assert decoded(found) == name
    assert re.fullmatch(r"[/\w.\- :]*", found)
    assert posixpath.normpath(found) == found
    assert not found.startswith(("..", "/"))


def test_names_stay_readable() -> None:
    assert encoded("bits_per_byte/language=ru") == "bits_per_byte/language:ru"
    assert encoded("loss/web/язык=ru") == "loss/web/язык:ru"
    assert encoded("a:b%") == "a 3a b 25 "
    for name in (".", "..", "../a", "a//b", "/a/", "a/./b", "a = b"):
        assert decoded(encoded(name)) == name
        assert posixpath.normpath(encoded(name)) == encoded(name)


@pytest.mark.parametrize(
    "address",
    [
        f"https://me:{KEY}@mlflow.example",
        f"https://{KEY}@mlflow.example",
        f"https://mlflow.example/?api_key={KEY}",
        f"postgresql://host/db?password={KEY}",
    ],
)
def test_a_key_in_an_address_is_refused_and_not_repeated(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"telemetry\.mlflow: tracking_uri holds .* MLFLOW_TRACKING_TOKEN") as error:
        config(tmp_path, f"telemetry.mlflow={{experiment: a, tracking_uri: '{address}'}}")
    assert KEY not in str(error.value)
    assert "\n" not in str(error.value)


def test_there_is_no_field_for_a_key(tmp_path: Path) -> None:
    for section in (f"wandb={{project: a, api_key: {KEY}}}", f"mlflow={{experiment: a, token: {KEY}}}"):
        with pytest.raises(UserError, match="unknown key") as error:
            config(tmp_path, f"telemetry.{section}")
        assert KEY not in str(error.value)


def test_secrets_are_taken_out_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert one_line(f"\n  no {KEY} at http://me:it@host/x  \nmore") == "no *** at http://***@host/x"
    assert len(one_line("x" * 1000)) == 300


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_library_is_one_line_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "_installed", lambda module: False)
    section = "wandb={project: a}" if name == "wandb" else "mlflow={experiment: a, tracking_uri: 'http://b'}"
    with pytest.raises(UserError) as error:
        check_trackers(config(tmp_path, f"telemetry.{section}"))
    assert str(error.value) == f"telemetry.{name} needs '{name}': pip install 'tlite_jax[{name}]'"
    check_trackers(config(tmp_path))


def test_a_directory_of_that_name_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_tracker_of_nobody").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not setup._installed("a_tracker_of_nobody")
    assert setup._installed("tlite_jax")


def test_mlflow_needs_an_address(tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    asked = config(tmp_path, "telemetry.mlflow={experiment: a}")
    with pytest.raises(UserError, match=r"tracking_uri is not given and MLFLOW_TRACKING_URI is not set; give one"):
        check_trackers(asked)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{KEY}@host")
    check_trackers(asked)
    place = setup._ids(tmp_path / setup.FILE, {"mlflow": "x"})
    assert setup._ids(tmp_path / setup.FILE, {"mlflow": "x"}) == place


def test_a_run_keeps_its_id_in_its_place_and_has_another_in_another(tmp_path: Path) -> None:
    path = tmp_path / setup.FILE
    first = setup._ids(path, {"wandb": "me/a", "mlflow": "http://host a"})
    assert setup._ids(path, {"wandb": "me/a"}) == {"wandb": first["wandb"]}
    moved = setup._ids(path, {"wandb": "me/b"})
    assert moved["wandb"] != first["wandb"]
    assert setup._ids(path, {"wandb": "me/b", "mlflow": "http://host a"}) == {**first, **moved}
    for damage in ("{", "[]", '{"wandb": 3}', '{"wandb": {"id": "x"}}'):
        path.write_text(damage)
        with pytest.raises(UserError, match=r"trackers\.json does not say .*; delete it") as error:
            setup._ids(path, {"wandb": "me/a"})
        assert "\n" not in str(error.value)


def sent_to_wandb(runs: Path) -> list[dict]:
    (path,) = runs.iterdir()
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(records: Sequence[dict]) -> list[dict[str, float]]:
    """What was logged, as metrics.jsonl says it."""
    return [record["log"] for record in records if "log" in record]


def test_a_run_and_its_next_start_are_one_run_with_the_metrics_of_the_file(
    tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = tmp_path / "server.json"
    words = ["telemetry.wandb={project: p, entity: e, tags: [t]}", *tiny.LONGER]
    words.append(f"telemetry.mlflow={{experiment: x, tracking_uri: '{server}', tags: {{team: a}}}}")
    asked = tiny.config(tmp_path / "run", *tiny.from_imported(), *words)
    tiny.start(override(asked, ["train.steps=3"]))
    ids = json.loads((tmp_path / "run" / setup.FILE).read_text())
    tiny.start(override(asked, ["train.steps=6"]))
    lines = [
        {name: value for name, value in record.items() if name != "time"}
        for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "run" / setup.FILE).read_text()) == ids

    records = sent_to_wandb(stand_ins)
    assert steps(records) == lines
    starts = [record["init"] for record in records if "init" in record]
    assert [(start["project"], start["entity"], start["name"], start["resume"]) for start in starts] == [
        ("p", "e", "run", "allow")
    ] * 2
    assert starts[1]["config"]["train"]["steps"] == 6
    assert starts[1]["config"]["environment"]["jax"]
    assert [record["finish"] for record in records if "finish" in record] == [0, 0]

    (run,) = json.loads(server.read_text())["runs"].values()
    assert run["tags"] == {"team": "a", "tlite.run": ids["mlflow"]["id"]}
    assert run["params"]["optimizer.learning_rate"] == "0.01"
    assert run["status"] == ["RUNNING", "FINISHED", "RUNNING", "FINISHED"]
    found: dict[int, dict[str, float]] = {}
    for name, value, _, step in run["metrics"]:
        found.setdefault(step, {"step": step})[decoded(name)] = value
    assert list(found.values()) == lines

    seen = capfd.readouterr()
    assert "telemetry.wandb: https://wandb.example/run" in seen.out
    assert "warning:" not in seen.err
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_offline_the_newest_start_holds_all(tmp_path: Path, stand_ins: Path) -> None:
    """Since `wandb sync` replaces a run by one of the same id."""
    asked = config(tmp_path, "telemetry.wandb={project: p, mode: offline}")
    (tmp_path / "run").mkdir()
    lines = [{"step": 1, "time": 1.0, "loss": 4.0}, {"step": 2, "time": 2.0, "loss": "nan"}, {"step": 3, "time": 3.0}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (sink,) = make_trackers(asked, tmp_path / "run", start_step=2, total_steps=3)
    sink.write(3, {"loss": 2.0})
    sink.close()
    records = sent_to_wandb(stand_ins)
    assert records[0]["init"]["resume"] is None
    assert [(values["step"], str(values["loss"])) for values in steps(records)] == [(1, "4.0"), (2, "nan"), (3, "2.0")]


def test_signals_to_all_processes_of_a_job_leave_the_tracker_to_the_trainer(tmp_path: Path, stand_ins: Path) -> None:
    settings = dict.fromkeys(("project", "entity", "name", "group", "tags", "config"))
    settings |= {"mode": "online", "id": "abc", "directory": str(tmp_path)}
    sink = TrackerSink("wandb", command("wandb"), settings, total_steps=2, close_seconds=30.0)
    sink.write(1, {"loss": 1.0})
    while not sink.num_sent:
        os.sched_yield()
    assert sink._link is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(sink._link._process.pid, number)
    sink.write(2, {"loss": 1.0})
    sink.close()
    assert [values["step"] for values in steps(sent_to_wandb(stand_ins))] == [1, 2]
    assert sent_to_wandb(stand_ins)[-1] == {"finish": 0}


def test_a_broken_library_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise ImportError('no such symbol')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    sink = TrackerSink("wandb", command("wandb"), {}, total_steps=1, close_seconds=20.0)
    began = time.monotonic()
    sink.write(1, {"loss": 1.0})
    sink.close()
    assert time.monotonic() - began < 15.0
    assert "1 of 1 logged steps were not sent (no such symbol)" in capfd.readouterr().err
