"""`prepare` and `mixture` as a user calls them."""

import json
import sys
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


def test_declared_sizes_need_no_data(call: Callable[..., str]) -> None:
    declared = json.dumps(
        [
            {"labels": {"source": "cc", "language": "ru"}, "tokens": 64_000},
            {"labels": {"source": "code", "language": "code"}, "tokens": 6_401},
            {"labels": {"source": "ads", "language": "ru"}, "tokens": 640, "name": "ads"},
        ]
    )
    words = [f"data.declared={declared}", "train.steps=null", "train.batch_size=768"]
    words.append("data.mixture={tokens: 6_400_000, targets: {language=code: 0.1}, rates: {source=ads: 0.0}}")
    values = json.loads(call("mixture", *words, "--json"))
    assert {bucket["name"]: (bucket["rows"], bucket["consumed_rows"]) for bucket in values["buckets"]} == {
        "cc.ru": (1000, 90_000),
        "code.code": (101, 10_000),
        "ads": (10, 0),
    }
    table = call("mixture", *words, "--tokens-per-second", "1000", "--devices", "10", "--price", "3", "--top", "1")
    for line in (
        "10 devices at 1,000 tokens/s each: 0.01 days, 5 dollars at 3 a device and hour",
        "warning: 2 buckets are read more than 4 times: code.code (99.0), cc.ru (90.0)",
        "warning: language=code reaches 10.0% only by repetition: 99.01 passes over it",
        "warning: 1 bucket is not read at all: ads",
        "2 more (--all shows them)",
    ):
        assert line in table
    assert "cc.ru" in call("mixture", *words, "--all")
    with pytest.raises(UserError, match="no finished buckets"):
        call("mixture")
    call("prepare")
    assert "cc.ru" not in call("mixture", words[0])
    assert "cc.ru" in call("mixture", *words, "--declared")
    for options, match in (
        (["--declared"], "has no data.declared"),
        (["--devices", "3"], "need --tokens-per-second"),
        (["--tokens-per-second", "3"], "give --devices"),
        (["--tokens-per-second", "3", "--hardware", "zx81"], "zx81 is not known"),
        ([f"data.declared={json.dumps(json.loads(declared) * 2)}", "--declared"], r"two buckets are called cc\.ru"),
    ):
        with pytest.raises(UserError, match=match):
            call("mixture", *options)


@pytest.mark.parametrize(("stage", "tokens"), [(1, 90e9), (2, 60e9)])
def test_the_recipes_of_8b_are_planned_without_data(stage: int, tokens: float) -> None:
    config = Path(__file__).parents[2] / "configs" / f"tlite_8b_stage{stage}.yaml"
    app = typer.Typer()
    app.command()(mixture.main)
    values = json.loads(CliRunner().invoke(app, [str(config), "--json"]).stdout)
    assert values["tokens"] == pytest.approx(tokens, rel=1e-5)
    epochs = {bucket["name"]: bucket["epochs"] for bucket in values["buckets"]}
    if stage == 1:
        assert values["batches"] == 14_305
        assert values["targets"][0]["share"] == pytest.approx(0.85, abs=1e-6)
        assert epochs["fineweb_edu.en"] == pytest.approx(0.3, abs=2e-3)
    else:
        assert values["batches"] == 9_536
        assert epochs["books.ru"] == pytest.approx(3, abs=1e-4)
        assert epochs["cc.ru.ads"] < 0.05 < epochs["cc.ru.news"] < 0.2


def test_what_a_cluster_needs_is_said(call: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--executor slurm needs --partition"):
        call("prepare", "--executor", "slurm")
    with pytest.raises(UserError, match="--sbatch account: write option=value"):
        call("prepare", "--executor", "slurm", "--partition", "cpu", "--sbatch", "account")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--executor ray needs 'ray': pip install 'tlite_jax\[ray\]'"):
        call("prepare", "--executor", "ray")
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(UserError, match=r"--executor local needs 'datatrove': pip install 'tlite_jax\[data\]'"):
        call("prepare", "--executor", "local")


def test_prepare_says_what_it_removed(call: Callable[..., str], tmp_path: Path) -> None:
    question = " ".join(f"слово{number}" for number in range(20))
    write_jsonl(tmp_path / "quiz.jsonl", [{"question": question}])
    with (tmp_path / "ru.jsonl").open("a") as file:
        file.write("{broken\n" + json.dumps({"text": f"Вопрос: {question}"}) + "\n")
    quiz = f"{{name: quiz, paths: [{tmp_path}/quiz.jsonl], text_fields: [question]}}"
    said = call("prepare", f"data.prepare.decontaminate={{sets: [{quiz}]}}")
    for line in (
        "quarantined from ru: 1 (malformed JSON)",
        "evaluation set quiz: 1 items",
        "repeated quiz in ru: 1 dropped",
        f"each is listed in {tmp_path}/buckets/contamination.jsonl",
        "no token of a document is lost",
    ):
        assert line in said
