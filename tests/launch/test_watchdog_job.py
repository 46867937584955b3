"""Real jobs of three processes: one is stuck, one is killed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import tiny

REPOSITORY = Path(__file__).resolve().parent.parent.parent
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
TIMEOUT = 240
STUCK_AT = 14
FLOOR = 8.0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable]:
    """Starts a job of three processes and gives them, and the run's directory; none outlives the test."""
    processes: list[subprocess.Popen] = []

    def call(stuck: int, batch: int) -> tuple[list[subprocess.Popen], Path]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        run = tmp_path / "run"
        config = tiny.write_config(tmp_path / "run.yaml", run, watchdog={"step_floor": FLOOR})
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": QUICK, "PYTHONPATH": str(REPOSITORY)}
        for number in range(3):
            words = [sys.executable, "tests/launch/train_with_fault.py", str(stuck), str(batch), "train", str(config)]
            words += ["train.steps=3000", "data.mixture.tokens=1152000", "mesh.fsdp=3"]
            words += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "3", "--process-id", str(number)]
            with (tmp_path / f"{number}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(words, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )
        return processes, run

    yield call
    for process in processes:
        process.kill()
        process.wait()


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen], logs: Path) -> None:
    end = time.monotonic() + TIMEOUT
    while not ((run / "metrics.jsonl").exists() and step in tiny.metrics(run)):
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes), (logs / "0.log").read_text()
        time.sleep(0.05)


def test_a_stuck_process_ends_the_job_and_every_process_says_where_it_was(start, tmp_path: Path) -> None:
    processes, run = start(1, STUCK_AT)
    wait_for_step(run, STUCK_AT - 1, processes, tmp_path)
    began = time.monotonic()
    statuses = [process.wait(TIMEOUT) for process in processes]
    logs = [(tmp_path / f"{number}.log").read_text() for number in range(3)]
    assert statuses == [76, 76, 76], logs
    longest_step = 3.0  # on a machine with much else to do
    assert time.monotonic() - began < max(FLOOR, 3 * longest_step) + 12
    for number, log in enumerate(logs):
        stacks = (run / "watchdog" / f"rank-{number}.log").read_text()
        assert f"process {number} (" in stacks
        assert "in _loop" in stacks
        assert "the watchdog ends this job" in log
    assert "in never_comes" in (run / "watchdog" / "rank-1.log").read_text()
    assert re.search(r"process 1 \(.*\) is in data_wait since", logs[1])


def test_the_others_of_a_killed_process_end_within_fifteen_seconds(start, tmp_path: Path) -> None:
    processes, run = start(-1, 0)
    wait_for_step(run, 3, processes, tmp_path)
    processes[2].send_signal(signal.SIGKILL)
    began = time.monotonic()
    statuses = [process.wait(TIMEOUT) for process in processes[:2]]
    assert time.monotonic() - began < 15
    # jax's own thread may notice first; it aborts the process. Both statuses ask for a restart.
    assert set(statuses) <= {76, -signal.SIGABRT}, [(tmp_path / f"{number}.log").read_text() for number in range(2)]
