"""`prepare` and `mixture` as a user calls them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner
from written_texts import ENGLISH, RUSSIAN, make_texts, write_jsonl

from launch import mixture, prepare
from tlite_jax.config_files import save_config
from tlite_jax.errors import UserError


@pytest.fixture
def call(tmp_path: Path, run_config: Callable) -> Callable[..., str]:
    """Runs a command on a config of two sources and returns what it prints."""
    sources = []
    for name, sentences in (("ru", RUSSIAN), ("en", ENGLISH)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in make_texts(sentences, 80, 3)])
        sources.append({"name": name, "paths": [str(path)], "labels": {"language": name}})
    groups = [{"select": {"language": "ru"}, "share": 0.85}, {"select": {}, "share": 0.15}]
    save_config(run_config(sources, mixture={"groups": groups}), tmp_path / "run.yaml")
    app = typer.Typer()
    app.command("prepare")(prepare.main)
    app.command("mixture")(mixture.main)

    def invoke(command: str, *words: str) -> str:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, str(tmp_path / "run.yaml"), *words])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    return invoke


def test_prepare_then_mixture(call: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="no finished buckets"):
        call("mixture")
    first = json.loads(call("prepare", "--json"))
    assert not first["reused"]
    assert [bucket["name"] for bucket in first["buckets"]] == ["ru.ru", "en.en"]
    assert "nothing to do" in call("prepare")
    with pytest.raises(UserError, match="--force"):
        call("prepare", "data.sequence_length=32")
    assert "prepared: 160 documents" in call("prepare", "data.sequence_length=32", "--force")


def test_mixture_says_what_will_be_consumed(call: Callable[..., str]) -> None:
    rows = {bucket["name"]: bucket["rows"] for bucket in json.loads(call("prepare", "--json"))["buckets"]}
    usage = json.loads(call("mixture", "train.steps=25", "--json"))
    assert (usage["rows"], usage["batches"], usage["tokens"]) == (200, 25, 200 * 64)
    russian, english = usage["buckets"]
    assert (russian["consumed_rows"], english["consumed_rows"]) == (170, 30)
    assert russian["epochs"] == 170 / rows["ru.ru"]
    table = call("mixture", "train.steps=25")
    for cell in (
        "ru.ru",
        "source: ru, language: ru",
        f"{170 / rows['ru.ru']:.3f}",
        "85.00%",
        "12,800",
        usage["plan_hash"],
    ):
        assert cell in table
