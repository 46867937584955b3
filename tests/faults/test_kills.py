"""A slice of the kill sweep; `make test-faults` runs the whole of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Little code generation, the same in all of them: compiling is most of the time.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


@pytest.mark.parametrize("words", [(), ("--local",)], ids=["", "local"])
def test_killed_runs_end_with_the_bits_of_an_undisturbed_one(words: tuple[str, ...], tmp_path: Path) -> None:
    log = tmp_path / "kills.jsonl"
    command = [sys.executable, "-m", "tests.faults.kills", "--count", "3", "--seed", "39", "--log", str(log), *words]
    environment = {**os.environ, "XLA_FLAGS": QUICK}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kills = [line for line in lines if "kill" in line]
    assert [kill["number"] for kill in kills] == [0, 1, 2]
    assert any(kill["in_save"] for kill in kills)
    assert any(kill["local"] for kill in kills) == bool(words)
    assert [line["equal"] for line in lines if "run" in line][-1] == ["losses", "rows", "state", "step"]
