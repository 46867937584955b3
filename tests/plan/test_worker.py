"""Compiling elsewhere: every variant has its answer, whatever becomes of the compiler."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny
from tests.plan.fakes import collective, hardware, program
from tlite_jax.config import RunConfig
from tlite_jax.config_files import override, parse
from tlite_jax.errors import UserError
from tlite_jax.plan import worker
from tlite_jax.plan.program import Program
from tlite_jax.plan.topology import load_hardware
from tlite_jax.plan.worker import Failure, Request, compile_variants, serve

STEP = program(collective(), violations=("one",))
FAKE_COMPILER = """
import os, signal, sys, types

def compile_program(config, devices, *, devices_per_node):
    import json
    from tlite_jax.plan.program import Program
    print("compilers print")
    remat = config.execution.remat
    if remat == "none":
        print("F0000 00:00:00 compiler.cc:1] Check failed: a != b", file=sys.stderr, flush=True)
        os.abort()
    if remat == "full":
        sys.exit(3)
    if remat == "attention":
        signal.pause()
    program = json.loads(STEP)
    return Program.from_json({**program, "num_devices": len(devices), "num_nodes": devices_per_node,
                              "num_microbatches": config.execution.num_microbatches})

module = types.ModuleType("tlite_jax.plan.compile")
module.compile_program = compile_program
sys.modules["tlite_jax.plan.compile"] = module
"""


def request(*variants: tuple[str, ...], nodes: int = 2) -> Request:
    """Of the tests' run on machines of two CPU devices."""
    config = override(parse(RunConfig, tiny.values(Path("nowhere"), Path("run")), "test"), ["execution.remat=dots"])
    return Request(config=config, hardware=hardware(), nodes=nodes, variants=variants)


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for plan.compile: aborts under remat none, exits under full, hangs under attention."""
    source = f"STEP = {json.dumps(json.dumps(STEP.to_json()))}\n{FAKE_COMPILER}"
    (tmp_path / "sitecustomize.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))


def test_a_program_travels_as_json() -> None:
    assert Program.from_json(json.loads(json.dumps(STEP.to_json()))) == STEP


def test_a_request_travels_as_json() -> None:
    sent = request(("seed=2",), ())
    assert parse(Request, json.loads(sent.model_dump_json()), "request") == sent


@pytest.mark.usefixtures("fake_compiler")
def test_answers_come_in_order_and_an_abort_is_one_of_them() -> None:
    three, aborts, five = (f"execution.num_microbatches={n}" for n in (3, 4, 5))
    answers = list(compile_variants(request((three,), (aborts, "execution.remat=none"), (five,))))
    assert [answer.num_microbatches for answer in (answers[0], answers[2])] == [3, 5]
    assert answers[0] == replace(STEP, num_devices=4, num_nodes=2, num_microbatches=3)
    assert isinstance(answers[1], Failure)
    assert answers[1].message.startswith("the compiler's process ended by SIGABRT: F0000")
    assert "a != b" in answers[1].message


@pytest.mark.usefixtures("fake_compiler")
def test_a_process_that_gives_up_is_not_started_again() -> None:
    answers = list(compile_variants(request(("execution.remat=full",), (), ())))
    assert len(answers) == 3
    assert {answer.message for answer in answers} == {"the compiler's process ended with status 3: compilers print"}


@pytest.mark.usefixtures("fake_compiler")
def test_closing_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    real = worker.subprocess.Popen

    def popen(*arguments, **options):
        started.append(real(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(worker.subprocess, "Popen", popen)
    answers = compile_variants(request((), ("execution.remat=attention",)))
    assert isinstance(next(answers), Program)
    (process,) = started
    assert process.returncode is None
    answers.close()
    assert process.returncode == -signal.SIGKILL
    assert len(started) == 1


def test_errors_are_told_apart() -> None:
    errors = iter(
        [
            UserError("a mistake; mend it"),
            RuntimeError("first line\nsecond line"),
            RuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error.\nUsed 20.5G of 15.7G hbm.\nMore"),
        ]
    )

    def compile_program(*_, **__):
        raise next(errors)

    written: list[dict] = []
    serve(request((), (), (), ("seed=-1",)), compile_program, written.append)
    assert [Failure(**answer["error"]) for answer in written] == [
        Failure("a mistake; mend it", is_mistake=True),
        Failure("RuntimeError: first line"),
        Failure("RuntimeError: Used 20.5G of 15.7G hbm.", is_memory=True),
        Failure("override: seed: Input should be greater than or equal to 0 (got -1)", is_mistake=True),
    ]


@pytest.mark.parametrize(
    ("name", "absent", "extra"),
    [
        ("a100-80gb", "jax_plugins.xla_cuda12 jax_plugins.xla_cuda13", "plan-gpu"),
        ("h100", "nvidia.cudnn", "plan-gpu"),
        ("v5p", "libtpu", "plan-tpu"),
    ],
)
def test_a_missing_plugin_names_its_extra(name: str, absent: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Path(__file__).resolve().parent.parent.parent / "configs" / "hardware"
    machine = load_hardware(name, directory)
    monkeypatch.setattr(
        worker.importlib.util, "find_spec", lambda module: None if module in absent.split() else object()
    )
    assert f"pip install 'tlite_jax[{extra}]'" in worker.plugin_is_missing(machine)
    monkeypatch.setattr(worker.importlib.util, "find_spec", lambda module: object())
    assert worker.plugin_is_missing(machine) is None
    assert worker.plugin_is_missing(hardware()) is None
