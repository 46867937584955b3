"""`python -m launch plan` as a user meets it; the compiler is replaced, but for one real run on CPU devices."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import tiny
from tests.launch.in_process import run_command
from tests.plan.fakes import GIB, collective, program
from tlite_jax.config_files import override
from tlite_jax.plan import worker
from tlite_jax.plan.program import Program
from tlite_jax.plan.worker import Failure, Request

REPOSITORY = Path(__file__).resolve().parent.parent.parent


class Ended(NamedTuple):
    """How a call ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr."""
        return self.err.splitlines()[-1]


class Compiler:
    """Stands in for the worker: a step whose peak memory is `peak(config)` GiB."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.peak: Callable = lambda config: 3.0
        self.step = program(collective(overlapped_flops=1e30))
        self.failure: Failure | None = None

    def __call__(self, request: Request) -> Generator[Program | Failure, None, None]:
        self.requests.append(request)
        for words in request.variants:
            config = override(request.config, words)
            if self.failure is not None and not words:
                yield self.failure
                continue
            num_devices = request.nodes * request.hardware.devices_per_node
            memory = replace(self.step.memory, peak_bytes=round(self.peak(config) * GIB))
            yield replace(
                self.step,
                memory=memory,
                num_devices=num_devices,
                num_nodes=request.nodes,
                num_microbatches=config.execution.num_microbatches,
            )


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Replaces the compiling process."""
    fake = Compiler()
    monkeypatch.setattr(worker, "compile_variants", fake)
    monkeypatch.setattr(worker, "plugin_is_missing", lambda hardware: None)
    return fake


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Ended]:
    """Calls `plan` on the tests' run, in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    tiny.write_config(tmp_path / "run.yaml", tmp_path / "run")

    def invoke(*words: object, config: Path | None = None) -> Ended:
        return Ended(*run_command(monkeypatch, capsys, "plan", config or tmp_path / "run.yaml", *words))

    return invoke


BATCH = ("train.batch_size=96", "execution.remat=dots", "execution.num_microbatches=3")


def test_a_plan_that_fits(plan: Callable[..., Ended], compiler: Compiler, tmp_path: Path) -> None:
    ended = plan(*BATCH, "--hardware", "h100", "--nodes", "2", "--json", "--price", "2")
    assert ended.status == 0
    value = json.loads(ended.out)
    assert value["fits"] is True
    assert value["hardware"].startswith("NVIDIA H100")
    assert (value["devices"], value["mesh"]) == (16, {"replica": 1, "fsdp": 16, "context": 1})
    assert value["memory"]["capacity_bytes"] == compiler.requests[0].hardware.memory_bytes
    assert value["dollars"] > 0
    assert (value["remedies"], value["audit"]) == ([], None)
    assert ended.err == "compiling for 2 nodes\n"
    text = plan(*BATCH, "--hardware", "h100", "--nodes", "2")
    assert (text.status, compiler.requests[-1].nodes) == (0, 2)
    assert "2 nodes, 16 devices, replica 1 x fsdp 16, 3 microbatches" in text.out
    assert not (tmp_path / "run").exists()


def test_nodes_default_to_what_the_mesh_takes(plan: Callable[..., Ended], compiler: Compiler) -> None:
    assert plan(*BATCH, "mesh.replica=2", "mesh.fsdp=16", "--hardware", "v5p").status == 0
    assert compiler.requests[0].nodes == 8
    ended = plan(*BATCH, "--hardware", "v5p")
    assert ended.status == 2
    assert "give --nodes" in ended.error


def test_what_a_user_gets_wrong_is_one_line(plan: Callable[..., Ended], compiler: Compiler) -> None:
    for words, message in [
        (("--hardware", "a10", "--nodes", 1), "--hardware a10 is not known; choose from 7x, a100-40gb"),
        (("mesh.replica=3", "mesh.fsdp=8", "--nodes", 2), "replica 3 x fsdp 8 = 24 devices, but 2 nodes of 8 are 16"),
        (("mesh.replica=3", "mesh.fsdp=4", "--nodes", 2), "replica 3 x fsdp 4 = 12 devices, but 2 nodes of 8 are 16"),
        (("train.batch_size=20", "--nodes", 2), "train.batch_size 20 is not divisible by 16 devices"),
        (("--hardware", "v5e", "--nodes", 13), "13: 52 chips make no slices of v5e"),
        (("mesh.replicas=2", "--nodes", 2), "mesh.replicas: unknown key"),
    ]:
        ended = plan(*BATCH, *words)
        assert ended.status == 2, ended
        (line,) = ended.err.splitlines()
        assert message in line
        assert ended.out == ""
    assert compiler.requests == []


def test_a_missing_compiler_names_its_extra(plan: Callable[..., Ended], compiler: Compiler, monkeypatch) -> None:
    monkeypatch.setattr(
        worker, "plugin_is_missing", lambda hardware: "compiling needs pip install 'tlite_jax[plan-gpu]'"
    )
    ended = plan(*BATCH, "--nodes", 2)
    assert ended.status == 2
    assert ended.err == (
        "error: compiling needs pip install 'tlite_jax[plan-gpu]', or pass --allow-cpu for an upper bound\n"
    )
    bound = plan(*BATCH, "--nodes", 2, "--allow-cpu", "--json")
    assert json.loads(bound.out)["upper_bound"] is True
    assert compiler.requests[0].on_cpu


def test_what_does_not_fit_says_by_how_much_and_what_would(plan: Callable[..., Ended], compiler: Compiler) -> None:
    # 79.26 GiB, of which 2 are unseen and 5% stay free: 73.2 for the step.
    compiler.peak = lambda config: {"dots": 80, "attention": 74, "full": 70}[config.execution.remat]
    ended = plan(*BATCH, "--nodes", 2, "--json")
    assert ended.status == 1
    assert ended.error.startswith(
        "error: does not fit: needs 85.99 GiB (step 80.00, unseen 2.03, headroom 3.96) of 79.26, 6.73 too many; "
        "fits with execution.remat=full ("
    )
    assert "or with" not in ended.error  # the same with more microbatches is no other way
    value = json.loads(ended.out)
    assert value["fits"] is False
    (remedy,) = value["remedies"]
    assert (remedy["overrides"], remedy["fits"]) == (["execution.remat=full"], True)


def test_the_headroom_can_be_chosen(plan: Callable[..., Ended], compiler: Compiler) -> None:
    compiler.peak = lambda config: 75
    assert plan(*BATCH, "--nodes", 2).status == 1
    assert plan(*BATCH, "--nodes", 2, "--headroom", "0.01").status == 0


def test_more_nodes_are_tried_last(plan: Callable[..., Ended], compiler: Compiler) -> None:
    compiler.peak = lambda config: 2400 / (config.mesh.fsdp or 16)
    ended = plan(*BATCH, "--nodes", 2)
    assert ended.status == 1
    # 96 sequences do not divide over 64 devices.
    lean = "train.batch_size=128 mesh.replica=1 mesh.fsdp=64 execution.remat=full execution.num_microbatches=2"
    assert f"; fits with --nodes 8 {lean} (" in ended.error
    nodes = [request.nodes for request in compiler.requests]
    assert nodes[-2:] == [4, 8]
    assert set(nodes[:-2]) == {2}
    compiler.peak = lambda config: 1e6
    assert "nothing that was tried fits, up to 16 nodes" in plan(*BATCH, "--nodes", 2).error


def test_a_compiler_that_runs_out_of_memory_is_a_plan_that_does_not_fit(
    plan: Callable[..., Ended], compiler: Compiler
) -> None:
    compiler.failure = Failure("XlaRuntimeError: Used 20.5G of 15.7G hbm.", is_memory=True)
    ended = plan(*BATCH, "--hardware", "v5e", "--nodes", 4, "--json")
    assert ended.status == 1
    assert ended.error.startswith(
        "error: does not fit: XlaRuntimeError: Used 20.5G of 15.7G hbm.; fits with execution."
    )
    assert json.loads(ended.out)["fits"] is False


def test_other_failures_of_the_compiler(plan: Callable[..., Ended], compiler: Compiler) -> None:
    compiler.failure = Failure("the compiler's process ended by SIGABRT")
    ended = plan(*BATCH, "--nodes", 2)
    assert (ended.status, ended.error) == (1, "error: the compiler's process ended by SIGABRT")
    compiler.failure = Failure("execution.attention=cudnn has no document masks", is_mistake=True)
    assert plan(*BATCH, "--nodes", 2).status == 2


def test_the_audit_fails_a_program_that_is_worse_than_it_should_be(
    plan: Callable[..., Ended], compiler: Compiler
) -> None:
    good = replace(compiler.step.work, needed_flops=1340.0)
    compiler.step = replace(compiler.step, work=good)
    assert plan(*BATCH, "--nodes", 2, "--audit").status == 0
    compiler.step = replace(compiler.step, minimum_wire_bytes=4, violations=("gathers float32 weights",))
    ended = plan(*BATCH, "--nodes", 2, "--audit", "--json")
    assert ended.status == 1
    assert ended.error == "error: wire_ratio is 2.000, should be at most 1.01; gathers float32 weights"
    assert len(json.loads(ended.out)["audit"]) == 2
    compiler.step = replace(compiler.step, violations=tuple(f"violation {number}" for number in range(9)))
    ended = plan(*BATCH, "--nodes", 2, "--audit")
    assert ended.error.endswith("; violation 6; and 2 more")
    assert [line for line in ended.out.splitlines() if line.startswith("audit: ")][-1] == "audit: violation 8"
    assert plan(*BATCH, "--nodes", 2).status == 0


def test_a_search_ranks(plan: Callable[..., Ended], compiler: Compiler) -> None:
    compiler.peak = lambda config: 90 if config.execution.remat == "none" else 20
    ended = plan(*BATCH, "--nodes", 2, "--search", "--json")
    assert ended.status == 0
    candidates = json.loads(ended.out)["candidates"]
    assert {word for each in candidates for word in each["overrides"] if "remat" in word} == {"execution.remat=dots"}
    assert len(candidates) == 6  # two meshes of 16 devices, microbatches of one sequence, two and three
    text = plan(*BATCH, "--nodes", 2, "--search")
    assert "the fastest: mesh.replica=" in text.out
    compiler.peak = lambda config: 1e6
    ended = plan(*BATCH, "--nodes", 2, "--search")
    assert ended.status == 1
    assert ended.error.startswith("error: nothing fits on 2 nodes; nothing that was tried fits, up to 16 nodes")


def test_the_shape_comes_from_the_checkpoint(plan: Callable[..., Ended], compiler: Compiler, tmp_path: Path) -> None:
    assert plan(*BATCH, *tiny.from_imported(), "--nodes", 2).status == 0
    assert compiler.requests[0].config.model.hidden_size == tiny.MODEL["hidden_size"]
    ended = plan(*BATCH, *tiny.from_imported(), f"init_from.path={tmp_path}/absent", "--nodes", 2)
    assert ended.status == 2
    assert "model is null, and so that of init_from, but no checkpoint in" in ended.error


def test_the_real_step_on_cpu_devices(tmp_path: Path) -> None:
    """The command in its own process, compiling in another: the contract between them."""
    tiny.write_config(tmp_path / "run.yaml", tmp_path / "run")
    words = ["mesh.replica=2", "mesh.fsdp=4", "--hardware", "cpu", "--json"]
    command = [sys.executable, "-m", "launch", "plan", str(tmp_path / "run.yaml"), *words]
    ended = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    value = json.loads(ended.stdout)
    assert value["fits"] is True
    assert value["devices"] == value["nodes"] == 8
    assert value["memory"]["peak_bytes"] > value["memory"]["parameters_bytes"] > 0
    kinds = {(each["kind"], each["where"]) for each in value["collectives"]}
    assert {("all-gather", "loop"), ("all-reduce", "replica")} <= kinds
    assert "reduce-scatter" in {kind for kind, _ in kinds}
    assert value["step_seconds"] > 0
    assert not (tmp_path / "run").exists()
