"""`submit` on a real Slurm: preempted, a node lost, more nodes. A minute and a half; `make test-slurm` runs it."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.slurm.cluster import SlurmCluster, why_not

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STEPS, MORE_STEPS, EVERY = 240, 250, 40
TIMEOUT = 300
BEGAN = time.monotonic()

pytestmark = pytest.mark.skipif(
    not os.environ.get("TLITE_TEST_SLURM") or why_not() is not None,
    reason=why_not() or "takes minutes: make test-slurm",
)


def say(line: str) -> None:
    print(f"{time.monotonic() - BEGAN:6.1f} s  {line}", flush=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as running:
        say(f"Slurm is up: {' '.join(running.nodes)}")
        yield running


@pytest.fixture(scope="module")
def submit(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., "Job"]:
    directory = tmp_path_factory.mktemp("runs")
    mixture = tiny.values(tiny.data(), directory)["data"]["mixture"]
    data = {**tiny.values(tiny.data(), directory)["data"], "mixture": {**mixture, "tokens": 10**7}}
    config = tiny.write_config(
        directory / "run.yaml",
        directory / "unused",
        schedule={"name": "constant_with_warmup", "warmup_steps": 2},
        data=data,
        telemetry={"console": True, "tensorboard": False},
        checkpoint={"every": EVERY, "keep_latest": 2},
    )

    def call(name: str, steps: int, nodes: int, *options: str) -> Job:
        words = [f"output={directory / name}", f"train.steps={steps}", "--nodes", str(nodes), "--gpus-per-node", "0"]
        for variable in ("JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=2", "XLA_FLAGS=--xla_backend_optimization_level=0"):
            words += ["--env", variable]
        command = [sys.executable, "-m", "launch", "submit", str(config), *words, *options]
        ended = subprocess.run(command, cwd=REPOSITORY, env=cluster.environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        say(f"$ python -m launch submit run.yaml {shlex.join(words[1:4])} ... -> {ended.stdout.splitlines()[0]}")
        jobs = ended.stdout.splitlines()[0].removeprefix("submitted ").split(":")[0].split(", ")
        number = max(int(entry.name) for entry in Path(f"{directory / name}.jobs").iterdir())
        return Job(cluster, jobs, directory / name, Path(f"{directory / name}.jobs") / str(number))

    return call


class Job:
    """A submitted run."""

    def __init__(self, cluster: SlurmCluster, numbers: list[str], run: Path, directory: Path):
        self.cluster, self.numbers, self.run, self.directory = cluster, numbers, run, directory

    @property
    def number(self) -> str:
        return self.numbers[0]

    def history(self) -> list[str]:
        file = self.directory / "history.log"
        return file.read_text().splitlines() if file.exists() else []

    def wait(self, done: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + TIMEOUT
        while not done():
            assert time.monotonic() < end, f"no {what}; {self.history()}; {self.logs()}"
            time.sleep(0.1)
        say(f"job {self.number}: {what}")

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: max(self.losses(), default=0) >= step, f"has trained step {step}")

    def wait_for_end(self) -> None:
        self.wait(lambda: self.cluster.job(self.number)["JobState"] == "COMPLETED", "COMPLETED")

    def losses(self) -> dict[int, float]:
        return tiny.metrics(self.run) if (self.run / "metrics.jsonl").exists() else {}

    def logs(self) -> str:
        return "\n".join(f"{file.name}: {file.read_text()[-1500:]}" for file in (self.directory / "logs").iterdir())


def test_a_job_that_is_asked_to_make_room_a_lost_node_and_more_nodes(
    cluster: SlurmCluster, submit: Callable[..., Job]
) -> None:
    undisturbed = submit("undisturbed", MORE_STEPS, 2)
    job = submit("disturbed", STEPS, 2)

    job.wait_for_step(20)
    cluster.call("scancel", "--signal=USR1", job.number)
    say("$ scancel --signal=USR1")
    job.wait(lambda: any(line.endswith("status 75") for line in job.history()), "ended with status 75: saved")
    saved = max(job.losses())
    assert 20 <= saved < STEPS
    job.wait_for_step(saved + 1)
    assert cluster.job(job.number)["Restarts"] == "1"
    assert f"going on from step {saved} of" in (job.directory / "logs" / f"{job.number}-0.log").read_text()

    job.wait_for_step((saved // EVERY + 1) * EVERY + 5)  # a checkpoint behind it, steps to lose
    nodes = cluster.call("scontrol", "show", "hostnames", cluster.job(job.number)["NodeList"]).split()
    cluster.kill_node(nodes[1])
    say(f"killed {nodes[1]}: slurmd and all its processes")
    job.wait(lambda: cluster.job(job.number)["Restarts"] == "2", "requeued")
    job.wait_for_end()
    undisturbed.wait_for_end()
    expected = undisturbed.losses()
    assert list(expected) == list(range(1, MORE_STEPS + 1))
    assert job.losses() == {step: expected[step] for step in range(1, STEPS + 1)}  # bit for bit
    say(f"losses of steps 1 to {STEPS} equal those of the undisturbed run bit for bit")
    for line in job.history():
        say(f"history.log: {line}")

    cluster.start_node(nodes[1])
    job.wait(lambda: set(cluster.states().values()) == {"idle"}, "all nodes are back")
    larger = submit("disturbed", MORE_STEPS, 4)
    larger.wait_for_end()
    assert larger.losses() == pytest.approx(expected, rel=1e-5)  # 8 devices sum in another order than 4
    say(f"the run went on from step {STEPS} to {MORE_STEPS} on 4 nodes")


def test_a_chain_stops_when_the_run_is_done(cluster: SlurmCluster, submit: Callable[..., Job]) -> None:
    job = submit("chained", 10, 2, "--chain", "3")
    assert len(job.numbers) == 3
    assert cluster.job(job.numbers[2])["Dependency"].startswith(f"afterany:{job.numbers[1]}")
    last = Job(cluster, job.numbers[2:], job.run, job.directory)
    last.wait_for_end()
    assert len(job.history()) == 1
    assert "nothing to do" in (job.directory / "logs" / f"{job.numbers[2]}.log").read_text()


def test_a_wrong_config_is_not_started_twice(cluster: SlurmCluster, submit: Callable[..., Job]) -> None:
    job = submit("wrong", 10, 2, "mesh.replica=3")
    job.wait(lambda: cluster.job(job.number)["JobState"] == "FAILED", "FAILED")
    assert cluster.job(job.number)["ExitCode"] == "2:0"
    assert (job.directory / "finished").read_text() == "2\n"
    assert "replica 3 x fsdp the rest in the config, 2 x 2 = 4 devices found" in job.logs()


def test_a_cancelled_job_stays_cancelled(cluster: SlurmCluster, submit: Callable[..., Job]) -> None:
    job = submit("cancelled", 5000, 2)
    job.wait_for_step(5)
    cluster.call("scancel", job.number)
    job.wait(lambda: bool(job.history()), "ended")
    assert job.history()[-1].endswith("status 75")  # saved all the same
    job.wait(lambda: cluster.job(job.number)["JobState"] == "CANCELLED", "CANCELLED")
    assert not cluster.call("squeue", "--noheader").strip()
