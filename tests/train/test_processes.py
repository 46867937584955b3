"""The real command in one and in two processes: the same losses, SIGUSR1 to one of them, resuming on one.

Losses agree to float32 rounding, not bit for bit: between processes the sums are taken in another order.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.train_parts.evaluation import make_evaluation
from tests import tiny
from tlite_jax.best import BOARD_FILE
from tlite_jax.checkpoint import find, steps_on_disk
from tlite_jax.train.directory import ANOMALIES_FILE
from tlite_jax.train.run import open_run

BATCH_SIZE = 24
MANY_STEPS = 5000  # more than a preempted job can take
TOKENS = MANY_STEPS * BATCH_SIZE * tiny.LENGTH
REPOSITORY = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 300
# Little code generation, the same in all of them: else each process compiles for a long time.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


class Job:
    """`launch train` in several processes of so many devices each; `flip` is a word for tests/train/flipping.py."""

    def __init__(
        self,
        directory: Path,
        config: Path,
        output: Path,
        steps: int,
        *words: str,
        processes: int,
        devices: int,
        flip: str | None = None,
    ):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": QUICK}
        self.processes = []
        for number in range(processes):
            command = [sys.executable, "-m", *(["tests.train.flipping", flip] if flip else ["launch"])]
            command += ["train", str(config), f"output={output}", f"train.steps={steps}", *words]
            if processes > 1:
                command += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes)]
                command += ["--process-id", str(number)]
            self.logs = directory / f"{output.name}-{processes}-{number}.log"
            with self.logs.open("w") as log:
                self.processes.append(
                    subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )

    def wait(self) -> list[int]:
        """Exit statuses."""
        end = time.monotonic() + TIMEOUT
        return [process.wait(max(1, end - time.monotonic())) for process in self.processes]

    def wait_under_signals(self, number: signal.Signals) -> list[int]:
        """Exit statuses, while the same signal keeps coming."""
        end = time.monotonic() + TIMEOUT
        while any(process.poll() is None for process in self.processes):
            assert time.monotonic() < end, self.logs.read_text()
            for process in self.processes:
                process.send_signal(number)
            time.sleep(0.05)
        return self.wait()

    def wait_for_step(self, metrics: Path) -> None:
        """Returns when a step has been logged and training goes on."""
        end = time.monotonic() + TIMEOUT
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < end, self.logs.read_text()
            assert all(process.poll() is None for process in self.processes), self.logs.read_text()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Starts jobs; none outlives the tests."""
    directory = tmp_path_factory.mktemp("jobs")
    # A budget and a schedule that do not depend on the number of steps, so that it may differ between starts.
    mixture = tiny.values(tiny.data(), directory)["data"]["mixture"]
    config = tiny.write_config(
        directory / "run.yaml",
        directory / "unused",
        train={"batch_size": BATCH_SIZE},
        schedule={"name": "constant_with_warmup", "warmup_steps": 2},
        data={**tiny.values(tiny.data(), directory)["data"], "mixture": {**mixture, "tokens": TOKENS}},
    )
    jobs: list[Job] = []

    def call(
        name: str, steps: int, *words: str, processes: int, devices: int, flip: str | None = None
    ) -> tuple[Job, Path]:
        jobs.append(
            Job(directory, config, directory / name, steps, *words, processes=processes, devices=devices, flip=flip)
        )
        return jobs[-1], directory / name

    yield call
    for process in (process for job in jobs for process in job.processes):
        process.kill()
        process.wait()


def test_two_processes_equal_one_and_one_of_them_is_preempted(start) -> None:
    two, run = start("run", MANY_STEPS, processes=2, devices=4)
    two.wait_for_step(run / "metrics.jsonl")
    two.processes[1].send_signal(signal.SIGUSR1)
    asked = time.monotonic()
    assert two.wait_under_signals(signal.SIGTERM) == [75, 75]
    assert time.monotonic() - asked < 30  # a usual grace period
    (stopped,) = steps_on_disk(run)
    assert 0 < stopped < MANY_STEPS
    assert os.listdir(run / "checkpoints") == [str(stopped)]
    before = tiny.metrics(run)
    assert list(before) == list(range(1, stopped + 1))

    one, whole = start("whole", stopped + 3, processes=1, devices=8)
    assert one.wait() == [0]
    expected = tiny.metrics(whole)
    assert before == pytest.approx({step: expected[step] for step in before}, rel=1e-6)

    resumed, _ = start("run", stopped + 3, processes=1, devices=8)
    assert resumed.wait() == [0]
    assert tiny.metrics(run) == pytest.approx(expected, rel=1e-6)
    assert find(run).meta.rows_consumed == find(whole).meta.rows_consumed == (stopped + 3) * BATCH_SIZE


def test_one_of_two_processes_that_cannot_start_does_not_hang_the_other(start, tmp_path: Path) -> None:
    """Both find the same error; neither waits for the other."""
    (tmp_path / "file").touch()
    job, output = start(str(tmp_path / "file" / "run"), 7, processes=2, devices=4)
    assert job.wait() == [2, 2]
    lines = [line for line in job.logs.read_text().splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "cannot write to" in lines[0]
    assert not output.exists()


def test_two_processes_evaluate_as_one_and_stop_together(start, tmp_path: Path) -> None:
    words = [
        "evaluation={every: 2, batch_size: 8, kl: {tokens: 100, top_k: 8}, best: {objective: {language=ru: 1.0}}, "
        "samples: [Чтобы], sample_tokens: 3, watch: [{select: {}, metric: kl, worse_by: 1e-9, action: stop}]}",
        f"data.mixture.tokens={TOKENS}",
        "schedule={name: constant_with_warmup, warmup_steps: 1}",
    ]
    two, run = start("evaluated", 6, *words, processes=2, devices=4)
    assert two.wait() == [1, 1], two.logs.read_text()
    assert steps_on_disk(run) == [2], two.logs.read_text()
    found = [json.loads(line) for line in (run / BOARD_FILE).read_text().splitlines()]
    assert [line["step"] for line in found] == [0, 2]
    assert find(run, "best").step == 2
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == [
        "alerts.jsonl", "base.json", "base_kl", "best.json", "board.jsonl", "board.png", "board.svg", "samples.jsonl",
    ]  # fmt: skip

    config = tiny.config(tmp_path / "one", "train.steps=6", *words, "evaluation.samples=[]")
    mesh = tiny.mesh()
    evaluation = make_evaluation(open_run(config, mesh=mesh), mesh)
    assert tiny.start(config, mesh, evaluate=evaluation).stopped is not None
    expected = [json.loads(line) for line in (tmp_path / "one" / BOARD_FILE).read_text().splitlines()]
    for line, other in zip(found, expected, strict=True):
        for name, sums in other["scores"].items():
            assert line["scores"][name] == pytest.approx(sums, rel=1e-6)
        for name, sums in other["kl"].items():
            assert line["kl"][name] == pytest.approx(sums, rel=1e-3)


@pytest.mark.parametrize(
    ("check", "replica", "flip", "array"),
    [
        ("compare_replicas_every=1", 4, "state:3:1", "params.final_norm"),
        ("verify_every=3", 2, "state:4:1", "params.final_norm"),
        ("verify_every=3", 2, "loss:4:1", "metrics.loss"),
    ],
)
def test_a_bit_that_one_of_two_processes_has_wrong_ends_both(
    check: str, replica: int, flip: str, array: str, start
) -> None:
    """Replicas lie in both processes; the wrong bit in process 1 only. At step 3, or when it is computed again."""
    words = [f"train.{check}", f"mesh.replica={replica}", "checkpoint.every=1", f"data.mixture.tokens={TOKENS}"]
    name = f"wrong-{check}-{array}".replace("=", "-")
    job, run = start(name, 6, *words, processes=2, devices=4, flip=flip)
    assert job.wait() == [78, 78], job.logs.read_text()
    assert steps_on_disk(run) == [1, 2]
    (line,) = [json.loads(line) for line in (run / ANOMALIES_FILE).read_text().splitlines()]
    (wrong,) = line["arrays"]
    assert (line["step"], line["right_at"], wrong["array"], wrong["sure"]) == (3, 2 if replica == 4 else 0, array, True)
    for number in range(2):
        log = job.logs.with_name(f"{run.name}-2-{number}.log").read_text()
        (error,) = [text for text in log.splitlines() if text.startswith("error: step 3:")]
        assert "(process 1)" in error
        assert "(process 0)" not in error
        assert all(device in error for device in wrong["devices"])
