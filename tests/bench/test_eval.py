"""The benchmark of evaluation and generation: both contenders on a small model, and what is made of their numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import _eval_report

ROOT = Path(__file__).resolve().parent.parent.parent


def turn(ours: float, theirs: float, *, quiet: bool = True) -> dict:
    def answers(seconds: float, logprob: float) -> dict:
        return {"seconds": seconds, "count": 10, "result": [[logprob, True, 2]]}

    both = {"ours": answers(ours, -3.0), "theirs": answers(theirs, -3.5)}
    return {"quiet": quiet, "answers": dict.fromkeys(_eval_report.GOALS, both)}


def test_ratios_are_those_of_quiet_turns():
    turns = [turn(1.0, 2.0), turn(1.0, 90.0, quiet=False), turn(2.0, 6.0), turn(1.0, 9.0)]
    row = _eval_report.summarise(turns)["lone"]
    assert row["ratio"] == 3.0
    assert row["ours"] == 10.0
    assert _eval_report.summarise([turn(1.0, 5.0, quiet=False)])["lone"]["ratio"] == 5.0
    assert "| lone | 10.0 | 1.7 | 3.00 | 1.5 |" in _eval_report.table(_eval_report.summarise(turns))


def test_answers_are_compared():
    assert _eval_report.agreement([turn(1.0, 2.0)]).startswith(
        "log-likelihoods differ by at most 2.5e-01 nats a token, 0"
    )


def test_evaluation_in_the_loop_costs_little_of_the_8b_recipe():
    line = _eval_report.in_loop_cost()
    # 2e6 / 3 of 250 * 768 * 8192 tokens' worth.
    assert f"{2e6 / 3 / (250 * 768 * 8192):.3%}" == "0.042%"
    assert "17.16 of 51.47 GFLOP a token" in line
    assert "0.042% of training" in line


def test_both_contenders_answer_alike():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is 200 MB: make test-eval installs it")
    pytest.importorskip("accelerate", reason="HFLM needs it: make test-eval installs it")
    options = ["--tiny", "--questions", "2", "--new-tokens", "4", "--repeats", "1", "--minutes", "0"]
    quick = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}
    command = [sys.executable, str(ROOT / "bench" / "eval.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=quick)
    assert done.returncode == 0, done.stderr
    assert "0 greedy flags differ; 36 of 36 greedy tokens are equal" in done.stdout
    summary = json.loads(done.stdout.splitlines()[-1])
    assert set(summary["rows"]) > set(_eval_report.GOALS)
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in summary["rows"].values())
