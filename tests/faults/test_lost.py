"""Jobs of three processes: one is killed, one is stuck, one never comes, one is slow. `make test-faults` has more."""

import json
import os
import subprocess
import sys

import pytest

from tests.faults.lost import GONE_SECONDS, STEP_FLOOR

# Little code generation, the same in all of them: compiling is most of the time.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
KINDS = ("killed", "stuck", "absent", "data", "throttled")


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """What came of each job. That all ended with 76, in time and saying why, is looked at there."""
    command = [sys.executable, "-m", "tests.faults.slow", *KINDS, "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": QUICK})
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.get("fault") or line["slow"]: line for line in lines}


def test_the_others_of_a_killed_process_end_within_fifteen_seconds_with_76(found: dict[str, dict]) -> None:
    assert max(found["killed"]["others_ended_after"].values()) < GONE_SECONDS
    assert all("start it again" in line for line in found["killed"]["said"].values())


def test_a_stuck_process_ends_the_job_and_is_named_to_all(found: dict[str, dict]) -> None:
    stuck = found["stuck"]
    assert max(stuck["others_ended_after"].values()) < STEP_FLOOR + GONE_SECONDS
    assert all("the watchdog ends this job" in line for line in stuck["said"].values())


def test_those_that_have_come_name_the_one_that_has_not(found: dict[str, dict]) -> None:
    absent = found["absent"]
    who = f"error: process {absent['process']} has not come within 4 s (watchdog.join), start the job again"
    assert set(absent["said"].values()) == {who}


def test_a_process_whose_cpu_time_is_limited_is_named_as_the_slow_one(found: dict[str, dict]) -> None:
    (said,) = found["throttled"]["said"]
    assert said.startswith(f"process {found['throttled']['process']} (")
    assert "its devices take " in said


def test_the_process_that_waits_for_data_is_named_as_the_slow_one(found: dict[str, dict]) -> None:
    (said,) = found["data"]["said"]
    assert said.startswith(f"process {found['data']['process']} (")
    assert "times slower than the median of the others: data wait " in said
