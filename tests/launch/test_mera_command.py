"""`python -m launch eval CHECKPOINT --mera DIRECTORY`: from a checkpoint to the table and the submission."""

import json
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from bench import mini_mera
from launch.eval_parts.mera import fingerprint, sampling_of
from tests import tiny
from tests.helpers import quick_jit
from tests.launch.in_process import run_command
from tlite_jax.checkpoint import save_model
from tlite_jax.config import ModelConfig
from tlite_jax.evaluate.mera.tasks import TOTAL_TASKS
from tlite_jax.generate import Sampling
from tlite_jax.model.decoder import init_params
from tlite_jax.release.evaluated import from_mera

MODEL = ModelConfig(**{**tiny.MODEL, "max_position_embeddings": 1024})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("mera") / "run"
    params = jax.tree.map(np.asarray, init_params(MODEL, seed=3))
    save_model(run, params, MODEL, weights_dtype="float32", origin="a test")
    shutil.copytree(tiny.data() / "tokenizer", run / "tokenizer")
    return run


@pytest.fixture
def call(monkeypatch, capsys):
    monkeypatch.setenv("TLITE_DEBUG", "")
    monkeypatch.setattr("tlite_jax.evaluate.mera.run.MAX_NEW_TOKENS", 8)  # a random model never stops by itself
    monkeypatch.setattr(jax, "jit", quick_jit)

    def invoke(*words: object) -> tuple[int, str, str]:
        return run_command(monkeypatch, capsys, "eval", *words)

    return invoke


def test_all_tasks_of_the_total(checkpoint, tmp_path, call):
    data = mini_mera.write(tmp_path / "mera", documents=1, answers=True)
    words = (checkpoint, "--mera", data, "--output", tmp_path / "out", "--allow-code-execution")
    status, out, err = call(*words)
    assert (status, err.splitlines()[-1]) == (0, "ruHumanEval ...")
    found = json.loads((tmp_path / "out/results.json").read_text())
    scores = {name: task["score"] for name, task in found["tasks"].items()}
    assert found["total"] == pytest.approx(sum(scores.values()) / 17)
    assert f"{found['total']:.4f}" in out
    card = from_mera(found).rows
    assert (card[0].task, card[0].value) == ("MERA 1.1.0: total", found["total"])
    assert {row.task.removeprefix("MERA 1.1.0: "): row.num_fewshot for row in card[1:]} == {
        task.name: task.shots for task in TOTAL_TASKS
    }
    assert [name for name in scores if name not in out] == []
    assert "MERA's site also wants ruDetox.json, ruEthics.json, ruHateSpeech.json, ruHHH.json" in out
    with zipfile.ZipFile(tmp_path / "out/submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(f"{task.name}.json" for task in TOTAL_TASKS)
        assert all(len(json.loads(archive.read(name))["data"]["test"]) for name in archive.namelist())
    with zipfile.ZipFile(tmp_path / "out/submission_logs_public.zip") as archive:
        (first,) = json.loads(archive.read("bps_write_out_info.json"))
        assert list(first) == ["doc_id", "prompt_0", "logit_0", "prompt_1", "logit_1", "truth"]
        assert first["prompt_1"].endswith(" 0")
    # A second call asks nothing and says the same, as JSON.
    status, out, _ = call(*words, "--json")
    assert status == 0
    assert json.loads(out) == found | {"truncated": 0}


def test_a_part_and_without_running_programs(checkpoint, tmp_path, call):
    data = mini_mera.write(tmp_path / "mera", documents=2)
    words = (checkpoint, "--mera", data, "--output", tmp_path, "--limit", 1)
    status, out, _ = call(*words, "--mera-tasks", "rumodar, ruHumanEval", "--mera-split", "train")
    assert status == 0
    assert "ruHumanEval's programs were not run" in out
    assert "no total: it needs answers to all 17 tasks" in out
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["tasks"]["ruModAr"]["documents"] == 1
    assert found["tasks"]["ruHumanEval"]["metrics"] is None
    assert not (tmp_path / "submission.zip").exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--mera-version", "1.2.0"], "--mera-version 1.2.0: known is 1.1.0"),
        (["--mera-tasks", "rummlu,chegek"], "MERA has no task 'chegek'; nearest: CheGeKa"),
        (["--mera-split", "dev"], "--mera-split dev: choose test, train, public_test, validation"),
        (["--mera", "nowhere"], "--mera nowhere: no such directory; give a copy of MERA's dataset, or hub"),
        (["--mera-tasks", "LCS", "--mera-split", "validation"], "LCS: no validation or dev documents in"),
        (["--limit", "0.4"], "a limit of 0.4 leaves no document of BPS's 2"),
        (["--limit", "1.5"], "--limit 1.5: a whole number of documents, or a share of them below 1"),
        (["--tasks", "arc_easy"], "--tasks and --mera are two evaluations: give one of them"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(words, error, tmp_path, call):
    """Before any model is read: there is none here."""
    data = mini_mera.write(tmp_path / "mera", documents=2)
    status, _, err = call(tmp_path / "run", "--mera", data, "--output", tmp_path / "out", *words)
    assert status == 2
    assert err.startswith(f"error: {error}")
    assert len(err.splitlines()) == 1


def test_an_output_directory_is_needed(tmp_path, call):
    status, _, err = call(tmp_path / "run", "--mera", tmp_path)
    assert (status, err) == (
        2,
        "error: --mera needs --output DIRECTORY, for the answers, the results and the submission\n",
    )


def test_sampling_follows_the_model(checkpoint, tmp_path):
    assert sampling_of(checkpoint, None) == Sampling(temperature=1.0, top_k=50)
    (tmp_path / "config.json").write_text("{}")
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert sampling_of(tmp_path, None) == Sampling(temperature=0.6, top_k=50, top_p=0.9)


def test_other_weights_are_another_model(checkpoint, tmp_path):
    before = fingerprint(checkpoint, None)
    assert fingerprint(checkpoint, None) == before
    assert fingerprint(Path(f"{checkpoint}@0"), None) == before
    assert fingerprint(Path("org/name"), None) == "org/name"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    foreign = fingerprint(tmp_path, None)
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert len({before, foreign, fingerprint(tmp_path, None)}) == 3
